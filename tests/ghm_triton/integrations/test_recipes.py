"""The README's recipes, run as they are printed there."""

import math
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from ghm_triton import GHMCLoss, GHMRLoss, GuidedLoss

README = Path(__file__).parents[3] / "README.md"
TOOLBOXES = (
    "ghm_triton.detection.heads",
    "custom_imports",
    "detectron2",
    "lightning",
    "ghm_triton.monitor",
)


def recipes():
    """The code blocks of the section, in order."""
    (section,) = re.findall(r"^## In your loop\n(.*?)^## ", README.read_text(), re.M | re.S)
    return re.findall(r"```python\n(.*?)```", section, re.S)


def recipe(toolbox):
    (block,) = [block for block in recipes() if toolbox in block]
    return block


def run(toolbox, **names):
    """What the names are after the recipe has run."""
    exec(compile(recipe(toolbox), README.name, "exec"), names)  # noqa: S102  (our own README)
    return names


def test_every_recipe_is_run_below():
    assert [sum(toolbox in block for block in recipes()) for toolbox in TOOLBOXES] == [1] * 5
    assert len(recipes()) == len(TOOLBOXES)


def test_torchvision():
    from torchvision.models.detection import retinanet_resnet50_fpn

    torch.manual_seed(0)
    model = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=64, max_size=64
    )
    run(
        "ghm_triton.detection.heads",
        model=model,
        num_classes=5,
        classify=GHMCLoss(average="positives"),
        regress=GHMRLoss(loss_weight=10.0),
        guide=GuidedLoss(),
    )
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    targets = [{"boxes": box, "labels": torch.tensor([3])}] * 2
    losses = model(list(torch.rand(2, 3, 64, 64)), targets)
    assert set(losses) == {"classification", "bbox_regression", "unguided_classification"}
    torch.testing.assert_close(losses["classification"], losses["bbox_regression"])
    sum(losses.values()).backward()
    stem = model.backbone.body.conv1.weight
    assert all(loss > 0 for loss in losses.values())
    assert torch.isfinite(model.head.classification_head.cls_logits.weight.grad).all()
    assert stem.grad is None or torch.isfinite(stem.grad).all()  # frozen unless asked for
    assert model.head.classification_loss.density.updates == 1
    assert "head.classification_loss.density.smoothed" in model.state_dict()


def test_mmdetection(tmp_path):
    from mmengine.config import Config
    from mmengine.registry import Registry

    import ghm_triton.integrations.mmdet as ours

    base = """model = dict(bbox_head=dict(
        num_classes=80,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0)))"""
    (tmp_path / "retinanet_r50_fpn_1x_coco.py").write_text(base)
    path = tmp_path / "ghm.py"
    path.write_text(recipe("custom_imports"))
    head = Config.fromfile(path).model.bbox_head
    registry = Registry("model")
    for loss in (ours.GHMC, ours.GHMR):
        registry.register_module(module=loss)
    classify, regress = registry.build(head.loss_cls), registry.build(head.loss_bbox)
    assert head.num_classes == 80
    assert (classify.density.bins, classify.density.momentum, classify.use_sigmoid) == (
        30,
        0.75,
        True,
    )
    assert (regress.density.bins, regress.density.momentum, regress.mu) == (10, 0.7, 0.02)
    assert regress.loss_weight == 10.0


class TestDetectron2:
    """Detectron2 is not on the package index: its shapes, on a stand-in for what the recipe uses.

    `losses` is called as `RetinaNet.forward_training` calls it: anchors by pyramid level, logits
    and deltas `[N, R_level, K or 4]` by level, labels `[R]` and boxes `[R, 4]` by image.
    """

    @pytest.fixture
    def detectron2(self, monkeypatch):
        registered = {}

        class RetinaNet(nn.Module):
            def __init__(self, num_classes, box2box_transform):
                super().__init__()
                self.num_classes, self.box2box_transform = num_classes, box2box_transform

        class Boxes:
            def __init__(self, tensor):
                self.tensor = tensor

            @classmethod
            def cat(cls, boxes):
                return cls(torch.cat([box.tensor for box in boxes]))

        class Registry:
            def register(self):
                return lambda cls: registered.setdefault(cls.__name__, cls)

        for name, content in {
            "detectron2": {},
            "detectron2.modeling": {"RetinaNet": RetinaNet, "META_ARCH_REGISTRY": Registry()},
            "detectron2.structures": {"Boxes": Boxes},
        }.items():
            module = types.ModuleType(name)
            module.__dict__.update(content)
            monkeypatch.setitem(sys.modules, name, module)
        return types.SimpleNamespace(Boxes=Boxes, registered=registered)

    class Transform:
        """The deltas of R-CNN, as `Box2BoxTransform(weights=(1, 1, 1, 1))` has them."""

        @staticmethod
        def get_deltas(anchors, boxes):
            (a_size, a_middle), (b_size, b_middle) = (
                (box[:, 2:] - box[:, :2], (box[:, 2:] + box[:, :2]) / 2) for box in (anchors, boxes)
            )
            return torch.cat([(b_middle - a_middle) / a_size, torch.log(b_size / a_size)], dim=1)

    def test_losses(self, detectron2):
        run("detectron2")
        model = detectron2.registered["HarmonizedRetinaNet"](3, self.Transform())
        generator = torch.Generator().manual_seed(0)
        levels, images = (12, 3), 2
        corners = [torch.rand(rows, 2, generator=generator) * 50 for rows in levels]
        anchors = [detectron2.Boxes(torch.cat([corner, corner + 16], dim=1)) for corner in corners]
        logits = [
            torch.randn(images, rows, 3, generator=generator, requires_grad=True) for rows in levels
        ]
        deltas = [
            torch.randn(images, rows, 4, generator=generator, requires_grad=True) for rows in levels
        ]
        labels = [torch.tensor([0, 1, 2, 3, -1] * 3), torch.tensor([3] * 15)]
        # An image without objects has boxes of no size, whose deltas are not finite.
        boxes = [torch.cat([a.tensor for a in anchors]) + 2.0, torch.zeros(15, 4)]
        losses = model.losses(anchors, logits, labels, deltas, boxes)

        index, positive = torch.stack(labels), torch.tensor([True, True, True, False, False] * 3)
        flat, moved = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)[0, positive]
        expected = torch.tensor([0.125, 0.125, 0.0, 0.0]).expand(9, 4)  # 2 of 16 pixels
        torch.testing.assert_close(losses["loss_cls"], losses["loss_box_reg"])
        torch.testing.assert_close(  # the deltas are rounded
            losses["loss_box_reg"], GHMRLoss(loss_weight=10.0)(moved, expected), rtol=1e-5, atol=0
        )
        sum(losses.values()).backward()
        (slope,) = torch.autograd.grad(GHMCLoss()(flat, index), flat)
        given = torch.cat([level.grad for level in logits], dim=1)
        torch.testing.assert_close(given / given.norm(), slope / slope.norm())
        ignored, background = logits[0].grad[0, 4], logits[0].grad[0, 3]
        assert not ignored.any()
        assert background.all()
        assert torch.isfinite(deltas[0].grad).all()
        assert deltas[0].grad[0, :3].all()
        assert not deltas[0].grad[1].any()
        assert "classify.density.smoothed" in model.state_dict()


@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # Lightning's own
def test_lightning(tmp_path):
    import lightning

    torch.manual_seed(0)
    net = nn.Linear(8, 3)
    model = run("lightning")["Classifier"](net)
    before = net.weight.detach().clone()
    images, labels = torch.randn(12, 8), torch.arange(12) % 4  # 3 is background
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=4
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert trainer.global_step == 3
    assert not torch.equal(net.weight, before)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["classify.density.updates"] == 3
    # Debiased at momentum 0.75: three batches of 12 entries.
    assert math.isclose(state["classify.density.smoothed"].sum(), 12 * (1 - 0.75**3), rel_tol=1e-6)


def test_tensorboard(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, classify = nn.Linear(4, 3), GHMCLoss(average="positives")
    names = run(
        "ghm_triton.monitor",
        batches=[(torch.randn(8, 4), torch.randint(0, 4, (8,))) for _ in range(21)],
        model=model,
        classify=classify,
        regress=GHMRLoss(loss_weight=10.0),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    )
    names["monitor"].writer.close()
    shown = EventAccumulator("board").Reload()
    assert classify.density.updates == 21
    hard = shown.Scalars("ghm.classify/share_of_gradient/hard")
    assert [event.step for event in hard] == [0, 20]
    assert [event.value for event in shown.Scalars("ghm.regress/strength")] == [0.25, 0.25]
