import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead

from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.fcos import (
    FCOSDetector,
    HarmonizedFCOSHead,
    centerness,
    joint_logits,
)
from ghm_triton.detection.models.heads import HeadLosses
from ghm_triton.detection.models.losses import GeneralizedIoU
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.losses import FocalLoss, GHMCLoss

NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}


@pytest.fixture
def config(config: DetectorConfig) -> DetectorConfig:
    return dataclasses.replace(config, architecture="fcos", image_size=(96, 160))


@pytest.fixture
def losses() -> HeadLosses:
    return HeadLosses(GHMCLoss(momentum=0.0), GeneralizedIoU())


def scene(seed: int, boxes: int) -> dict[str, Tensor]:
    """Boxes of 4 to 1500 pixels; no two of about one area, which torchvision cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(boxes, 2, generator=generator) * torch.tensor([160.0, 96.0])
    half = 2 * 1.45 ** (torch.arange(boxes)[:, None] + torch.rand(boxes, 2, generator=generator))
    labels = torch.randint(0, 10, (boxes,), generator=generator)
    return {"boxes": torch.cat([centre - half, centre + half], 1), "labels": labels}


class Recorder(torch.nn.Module):
    """In the place of torchvision's head: notes what each point was matched with."""

    def compute_loss(self, targets, outputs, anchors, matched_idxs):
        self.matches = matched_idxs
        return {}


def test_points_learn_the_boxes_that_torchvision_gives_them(config):
    detector = FCOSDetector(config)
    targets = [scene(0, 16), NO_BOXES, scene(1, 3)]
    generator = detector.anchor_generator
    theirs = FCOS(detector.backbone, 10, anchor_generator=generator, head=Recorder())
    theirs.compute_loss(targets, {}, [detector.anchors] * 3, detector.level_points)
    ours = [detector.match(detector.anchors, t) for t in targets]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs.head.matches, strict=True))
    matched = set(ours[0].tolist()) - {-1}
    levels = torch.split(ours[0], detector.level_points)
    assert len(matched) > 8
    assert all(bool((level >= 0).any()) for level in levels)


def test_points_of_an_ignored_box_take_no_part(config):
    detector = FCOSDetector(config)
    target = scene(0, 16)
    seen = detector.match(detector.anchors, target)
    hidden = torch.arange(16) % 3 == 0
    labels = detector.labels([{**target, "ignore": hidden}])[0]
    on_hidden = (seen >= 0) & hidden[seen.clamp(min=0)]
    assert bool(on_hidden.any())
    assert torch.equal(labels == -1, on_hidden)
    assert torch.equal(labels == 10, seen < 0)
    own = (seen >= 0) & ~on_hidden
    assert torch.equal(labels[own], target["labels"][seen[own]])


def test_the_losses_are_torchvisions_where_they_should_be(config):
    """With focal loss: same labels, boxes, centerness and divisor as `FCOSHead.compute_loss`."""
    torch.manual_seed(0)
    detector = FCOSDetector(config, HeadLosses(FocalLoss(), GeneralizedIoU()))
    targets = [scene(0, 12), NO_BOXES, scene(1, 6)]
    outputs = detector.outputs(torch.randn(3, 3, *config.image_size))
    outputs["bbox_regression"] = outputs["bbox_regression"] + 2.0
    anchors = [detector.anchors] * 3
    matches = [detector.match(detector.anchors, t) for t in targets]
    ours = detector.head.compute_loss(targets, outputs, anchors, matches)
    theirs = FCOSHead.compute_loss(detector.head, targets, outputs, anchors, matches)
    assert ours.keys() == theirs.keys()
    for name, loss in ours.items():
        # Sums of up to 9 thousand float32 terms in different orders.
        assert float(loss.detach()) == pytest.approx(float(theirs[name].detach()), rel=1e-5)


class Asked(torch.nn.Module):
    def forward(self, *arguments):
        self.arguments = [argument.detach() for argument in arguments]
        return arguments[0].sum()


def test_the_box_loss_is_asked_for_predictions_and_then_truths(config):
    losses = HeadLosses(Asked(), Asked())
    detector = FCOSDetector(config, losses).eval()
    target = scene(0, 12)
    detector(torch.randn(1, 3, *config.image_size), [target])
    labels = detector.labels([target])[0]
    own = detector.match(detector.anchors, target)[labels < 10]
    predicted, true = losses.regression.arguments
    assert torch.equal(true, target["boxes"][own])
    assert predicted.shape == true.shape
    assert not torch.equal(predicted, true)


def test_the_density_is_that_of_the_whole_batch(config, losses):
    torch.manual_seed(0)
    detector = FCOSDetector(config, losses).eval()
    seen = []
    detector.observe_labels(seen.append)
    images, targets = torch.randn(2, 3, *config.image_size), [scene(0, 12), NO_BOXES]
    joint = detector(images, targets)["classification"].detach()
    logits = detector.outputs(images)["cls_logits"].detach()
    whole = GHMCLoss(momentum=0.0)(logits, detector.labels(targets))
    assert float(joint) == pytest.approx(float(whole), rel=1e-6)
    assert torch.equal(seen[0], detector.labels(targets))


def test_a_batch_without_positives_trains_on_its_background(config, losses):
    detector = FCOSDetector(config, losses).train()
    result = detector(torch.randn(2, 3, *config.image_size), [NO_BOXES, NO_BOXES])
    sum(result.values()).backward()
    assert float(result["bbox_regression"].detach()) == 0.0
    assert float(result["bbox_ctrness"].detach()) == 0.0
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
    assert bool(detector.head.classification_head.cls_logits.weight.grad.any())


def test_detections_are_torchvisions_on_the_same_weights():
    """torchvision's own `FCOS`, with our weights under its names, and its own inference."""
    torch.manual_seed(0)
    size = (64, 96)
    config = DetectorConfig(
        ("a", "b", "c"), size, architecture="fcos", backbone="resnet18", head_convs=4, prior=0.3
    )
    detector = FCOSDetector(config).eval()
    torch.nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.05)
    torch.nn.init.normal_(detector.head.regression_head.bbox_ctrness.weight, std=0.05)
    torch.nn.init.constant_(detector.head.regression_head.bbox_reg.bias, 1.5)
    theirs = FCOS(
        build_backbone(config)[0],
        3,
        anchor_generator=AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5),
        score_thresh=0.35,
        nms_thresh=0.4,
        min_size=64,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    ).eval()
    theirs.load_state_dict(detector.state_dict())
    images = torch.randn(3, 3, *size)
    with torch.inference_mode():
        expected = theirs(list(images))
        found = DeployedDetector(detector)(images, torch.full((3,), 0.35), torch.tensor([0.4]))
    assert_equal_detections(found, expected)


def assert_equal_detections(found: tuple[Tensor, ...], expected: list[dict[str, Tensor]]) -> None:
    for boxes, scores, labels, count, theirs in zip(*found, expected, strict=True):
        assert 5 < int(count) == len(theirs["scores"]) < len(scores)
        assert set(theirs["labels"].tolist()) == {0, 1, 2}
        # The same float32 operations but for their order.
        torch.testing.assert_close(scores[:count], theirs["scores"], rtol=0, atol=1e-6)
        assert torch.equal(labels[:count], theirs["labels"])
        torch.testing.assert_close(boxes[:count], theirs["boxes"], rtol=0, atol=1e-4)


def test_the_head_drops_into_torchvisions_own_fcos(config, losses):
    backbone, _ = build_backbone(config)
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model = FCOS(
        backbone,
        10,
        anchor_generator=anchors,
        min_size=96,
        max_size=96,
        head=HarmonizedFCOSHead(16, 10, losses=losses),
    )
    target = {"boxes": torch.tensor([[10.0, 10, 40, 45]]), "labels": torch.tensor([1])}
    result = model.train()([torch.rand(3, 96, 96)], [target])
    sum(result.values()).backward()
    assert set(result) == {"classification", "bbox_regression", "bbox_ctrness"}
    assert bool(model.head.classification_head.cls_logits.weight.grad.any())


def test_a_head_without_losses_says_so(config):
    with pytest.raises(RuntimeError, match="without losses"):
        FCOSDetector(config)(torch.zeros(1, 3, *config.image_size), [NO_BOXES])


def test_the_prior_is_the_probability_at_the_start(config):
    detector = FCOSDetector(dataclasses.replace(config, prior=0.02)).eval()
    with torch.inference_mode():
        logits = detector.outputs(torch.zeros(1, 3, *config.image_size))["cls_logits"]
    # The weights add a little to the bias; the median point stays near the prior.
    assert float(torch.sigmoid(logits).median()) == pytest.approx(0.02, rel=0.2)


def test_the_joint_logit_is_that_of_the_product():
    grid = torch.linspace(-30, 30, 41, dtype=torch.float64)
    a, b = grid[:, None], grid[None, :]
    # 1/p - 1 = e^-a + e^-b + e^-(a+b), by logarithms: nothing is lost at either end.
    terms = torch.stack(torch.broadcast_tensors(-a, -b, -a - b))
    expected = -torch.logsumexp(terms, dim=0)
    # float32 rounds the sum of exponentials to 1e-7 of itself, and the logarithm likewise.
    ours = joint_logits(a.float(), b.float()).double()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_of_two_scores_that_are_equal_in_float32_the_rank_tells():
    logits = torch.tensor([18.0, 18.5])
    scores = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(torch.tensor(20.0)))
    assert scores[0] == scores[1]
    ranks = joint_logits(logits, torch.tensor(20.0))
    assert ranks[0] < ranks[1]


@pytest.mark.parametrize("extreme", [1e4, -1e4, math.inf, -math.inf])
def test_ranks_are_finite_whatever_the_logits(extreme):
    ranks = joint_logits(torch.tensor([extreme, extreme]), torch.tensor([extreme, 0.0]))
    assert bool(torch.isfinite(ranks).all())


def test_centerness_is_the_papers():
    sides = torch.tensor([[2.0, 3.0, 2.0, 3.0], [1.0, 3.0, 4.0, 1.0], [5.0, 2.0, 1.0, 8.0]])
    expected = [1.0, math.sqrt(1 / 4 * 1 / 3), math.sqrt(1 / 5 * 2 / 8)]
    assert centerness(sides).tolist() == pytest.approx(expected, rel=1e-6)
