"""What a Faster R-CNN learns from: mined regions, or all of them."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector
from ghm_triton.detection.models.heads import HeadLosses
from ghm_triton.detection.training.build import build_losses
from ghm_triton.detection.training.config import TrainOptions

SIZE = (96, 128)
NO_BOXES = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
SCENE = {
    "boxes": torch.tensor([[4.0, 8.0, 40.0, 44.0], [50.0, 30.0, 110.0, 90.0]]),
    "labels": torch.tensor([2, 0]),
}
OPTIONS = TrainOptions(cls_loss="ce", reg_loss="sl1", mining_keep=7, steps=100)
KEEP, CLASSES = 7, 3


@pytest.fixture(params=["sigmoid", "softmax"])
def config(request: pytest.FixtureRequest) -> DetectorConfig:
    return DetectorConfig(
        ("a", "b", "c"),
        SIZE,
        channels=16,
        architecture="faster-rcnn",
        classifier=request.param,
        head_convs=1,
        region_samples=32,
    )


def built(config: DetectorConfig, **changes: object) -> FasterRCNNDetector:
    """In training, with logits that differ from region to region, and boxes that are off."""
    options = dataclasses.replace(OPTIONS, **changes)
    losses = build_losses(
        options,
        architecture="faster-rcnn",
        classifier=config.classifier,
        assigner=config.assigner,
    )
    return lively(config, losses)


def lively(config: DetectorConfig, losses: HeadLosses) -> FasterRCNNDetector:
    torch.manual_seed(0)
    detector = FasterRCNNDetector(config, losses)
    predictor = detector.roi_heads.box_predictor
    torch.nn.init.normal_(detector.rpn.head.cls_logits.weight, std=0.2)
    torch.nn.init.normal_(predictor.cls_score.weight, std=8.0)
    torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.5)
    detector.rpn._post_nms_top_n["training"] = 45  # torchvision's 2000 take a while by hand
    proposed = detector.rpn.filter_proposals

    def twice(*given: object) -> tuple[list[Tensor], list[Tensor]]:
        """Beside every proposal one that overlaps it by 0.82."""
        boxes, scores = proposed(*given)
        sides = [x[:, 2:] - x[:, :2] for x in boxes]
        right = torch.tensor([0.1, 0.0])
        beside = [x + (side * right).repeat(1, 2) for x, side in zip(boxes, sides, strict=True)]
        return [torch.cat(pair) for pair in zip(boxes, beside, strict=True)], scores

    detector.rpn.filter_proposals = twice
    return detector.train()


class Notes:
    """What a detector was given to choose from, what it looked at, and what it learnt from."""

    def __init__(self, detector: FasterRCNNDetector, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looks: list[tuple[Tensor, Tensor]] = []
        self.labels: list[Tensor] = []
        heads, classify = detector.roi_heads, detector.classify
        select, pool = heads.select_training_samples, heads.box_roi_pool.forward

        def note_choice(proposals, targets):
            self.regions, _, self.numbers, self.goals = select(proposals, targets)
            return list(self.regions), _, list(self.numbers), list(self.goals)

        def note_regions(features, regions, sizes):
            self.pooled = regions
            return pool(features, regions, sizes)

        def note_look(pooled):
            self.looks.append(classify(pooled))
            return self.looks[-1]

        monkeypatch.setattr(heads, "select_training_samples", note_choice)
        monkeypatch.setattr(heads.box_roi_pool, "forward", note_regions)
        monkeypatch.setattr(detector, "classify", note_look)
        detector.observe_labels(self.labels.append)


def loss_of(logits: Tensor, delta: Tensor, number: int, goal: Tensor) -> tuple[float, float]:
    """Cross entropy and smooth L1 of one region, in float64; `number` 0 is background."""
    x = logits.detach().double()
    if len(x) > CLASSES:
        classification = -torch.log_softmax(x, 0)[number]
    else:
        own = torch.arange(1, CLASSES + 1) == number
        classification = -torch.where(own, torch.sigmoid(x), torch.sigmoid(-x)).log().sum()
    if number == 0:
        return float(classification), 0.0
    d = (delta[number - 1].detach().double() - goal.double()).abs()
    return float(classification), float(torch.where(d < 1 / 9, 4.5 * d**2, d - 1 / 18).sum())


def iou(a: list[float], b: list[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    area = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / (sum(area) - both)


def by_hand(
    mining: str,
    losses: list[tuple[float, float]],
    boxes: list[list[float]],
    most: float = 0.7,
) -> set[int]:
    """The paper's: of regions that overlap by more than 0.7 the hardest, of those the hardest."""
    alpha = 0.75 if mining == "s-ohem" else 0.5
    weighed = [(2 * alpha * c, 2 * (1 - alpha) * r) for c, r in losses]
    left: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -sum(weighed[i])):
        if all(iou(boxes[i], boxes[j]) <= most for j in left):
            left.append(i)
    if mining == "ohem":
        return set(left[:KEEP])
    kept: set[int] = set()
    for stratum, quota in enumerate((2, 2, 2, 1)):
        of = [i for i in left if min(3, int(4 * weighed[i][1] / sum(weighed[i]))) == stratum]
        kept.update(of[:quota])
    kept.update([i for i in left if i not in kept][: KEEP - len(kept)])
    return kept


@pytest.mark.parametrize("mining", ["ohem", "s-ohem"])
def test_the_hardest_regions_of_every_image_are_learnt_from_alone(mining, config, monkeypatch):
    detector = built(config, mining=mining)
    notes = Notes(detector, monkeypatch)
    result = detector(torch.randn(3, 3, *SIZE), [SCENE, NO_BOXES, SCENE])
    sums, positives, spared = torch.zeros(2, dtype=torch.float64), 0, False
    learnt, _ = notes.looks[-1]
    for image, boxes in enumerate(notes.regions):
        logits, deltas = notes.looks[image]
        numbers, goals = notes.numbers[image].tolist(), notes.goals[image]
        assert not logits.requires_grad
        assert len(logits) == len(boxes) > 40
        losses = [loss_of(*of) for of in zip(logits, deltas, numbers, goals, strict=True)]
        kept = sorted(by_hand(mining, losses, boxes.tolist()))
        assert torch.equal(notes.pooled[image], boxes[kept])
        spared = spared or set(kept) != by_hand(mining, losses, boxes.tolist(), 0.9)
        sums += torch.tensor([losses[i] for i in kept]).sum(0)
        positives += sum(numbers[i] > 0 for i in kept)
    assert spared  # some overlapped a harder one by more than 0.7, and by less than 0.9
    assert learnt.requires_grad
    assert len(learnt) == 3 * KEEP
    assert 0 < positives < 2 * KEEP
    # Float32 sums of 21 regions.
    wanted = (sums / (3 * KEEP)).tolist()
    found = [float(result[name].detach()) for name in ("classification", "bbox_regression")]
    assert found == pytest.approx(wanted, rel=1e-5)
    sum(result.values()).backward()
    assert bool(detector.roi_heads.box_head.fc6.weight.grad.any())


def test_everything_is_mined_from_but_what_is_ignored(config, monkeypatch):
    detector = built(config, mining="ohem")
    notes = Notes(detector, monkeypatch)
    target = {**SCENE, "ignore": torch.tensor([False, True])}
    detector(torch.randn(1, 3, *SIZE), [target])
    assert len(notes.labels[0]) > 60
    overlap = box_iou(notes.regions[0], SCENE["boxes"][1:])
    assert float(overlap.max()) < 0.5
    assert set(notes.labels[0].tolist()) == {2, CLASSES}
    assert len(notes.looks[0][0]) == len(notes.labels[0])


def test_strata_move_once_a_step_whatever_the_images(config):
    detector = built(config, mining="s-ohem", steps=10)
    for _ in range(2):
        detector(torch.randn(3, 3, *SIZE), [SCENE, NO_BOXES, SCENE])
    assert int(detector.mining.choose.updates) == 2


@pytest.mark.parametrize("config", ["sigmoid"], indirect=True)
def test_an_adversary_meets_the_positives_that_were_mined(config, monkeypatch):
    detector = built(config, mining="ohem", adversarial="asdn")
    met = []
    adversary = detector.adversary.forward
    monkeypatch.setattr(
        detector.adversary, "forward", lambda x, p: met.append(len(x)) or adversary(x, p)
    )
    asked = []
    detector.regression_loss.register_forward_pre_hook(lambda _, given: asked.append(given[0]))
    detector(torch.randn(2, 3, *SIZE), [SCENE, SCENE])
    assert met == [len(asked[0])]
    assert 0 < met[0] <= 2 * KEEP


@pytest.mark.parametrize("cls_loss", ["ce", "ghm", "focal", "ghm-softmax"])
def test_every_classification_loss_can_be_mined(cls_loss, config):
    if (config.classifier == "softmax") != (cls_loss in ("ce", "ghm-softmax")):
        config = dataclasses.replace(
            config, classifier="softmax" if cls_loss == "ghm-softmax" else "sigmoid"
        )
    detector = built(config, mining="ohem", cls_loss=cls_loss, reg_loss="ghm")
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, NO_BOXES])
    sum(result.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
    assert all(float(x.detach()) > 0 for x in result.values())


@pytest.mark.parametrize("assigner", ["iou", "cleanliness"])
def test_guided_stages_learn_from_everything_and_weigh_as_their_boxes_do(
    assigner, config, monkeypatch
):
    config = dataclasses.replace(config, assigner=assigner)
    detector = built(config, guided_loss=True, sampling=False, cls_weight=2.0, reg_weight=0.5)
    notes = Notes(detector, monkeypatch)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, NO_BOXES])
    found = {name: float(loss.detach()) for name, loss in result.items()}
    logits, deltas = notes.looks[0]
    numbers, goals = torch.cat(notes.numbers).tolist(), torch.cat(notes.goals)
    assert len(numbers) > 100  # more than would be sampled of one, a fourth of them positive
    losses = torch.tensor(
        [loss_of(*of) for of in zip(logits, deltas, numbers, goals, strict=True)]
    ).double()
    positives = sum(n > 0 for n in numbers)
    assert 0 < positives < len(numbers) / 4
    # Cross entropy is divided by positives where it is of sigmoids, smooth L1 always.
    divisor = len(numbers) if config.classifier == "softmax" else positives
    # Float32 sums of hundreds of terms.
    unguided, boxes = float(losses[:, 0].sum() / divisor), float(losses[:, 1].sum() / positives)
    assert found["unguided_classification"] == pytest.approx(unguided, rel=1e-5)
    assert found["bbox_regression"] == pytest.approx(0.5 * boxes, rel=1e-5)
    assert found["classification"] == pytest.approx(2.0 * 0.5 * boxes, rel=1e-5)
    assert found["rpn_objectness"] == pytest.approx(found["rpn_box"], rel=1e-6)
    assert found["unguided_rpn_objectness"] != found["rpn_objectness"]
    gradient = [name for name, loss in result.items() if not loss.requires_grad]
    assert gradient == ["unguided_classification", "unguided_rpn_objectness"]
    sum(result.values()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())


@pytest.mark.parametrize("assigner", ["iou", "cleanliness"])
def test_guided_regions_are_sampled_all_the_same_and_proposals_are_not_guided(
    assigner, config, monkeypatch
):
    config = dataclasses.replace(config, assigner=assigner)
    detector = built(config, guided_loss=True, cls_weight=2.0)
    notes = Notes(detector, monkeypatch)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, SCENE])
    assert len(notes.looks[0][0]) <= 2 * config.region_samples
    found = {name: float(loss.detach()) for name, loss in result.items()}
    assert found["classification"] == pytest.approx(2 * found["bbox_regression"], rel=1e-6)
    assert found["unguided_classification"] != pytest.approx(found["classification"])
    assert "unguided_rpn_objectness" not in found
    assert found["rpn_objectness"] != pytest.approx(found["rpn_box"])
    assert detector.rpn.samples == (assigner == "iou")


def test_guided_regions_can_be_mined(config, monkeypatch):
    detector = built(config, mining="ohem", guided_loss=True)
    notes = Notes(detector, monkeypatch)
    result = detector(torch.randn(2, 3, *SIZE), [SCENE, SCENE])
    assert len(notes.looks[-1][0]) == 2 * KEEP
    found = {name: float(loss.detach()) for name, loss in result.items()}
    assert found["classification"] == pytest.approx(found["bbox_regression"], rel=1e-6)


def test_a_guided_batch_without_boxes_learns_its_background(config):
    detector = built(config, guided_loss=True, sampling=False)
    result = detector(torch.randn(2, 3, *SIZE), [NO_BOXES, NO_BOXES])
    found = {name: float(loss.detach()) for name, loss in result.items()}
    assert found["bbox_regression"] == found["rpn_box"] == 0.0
    assert found["classification"] == found["unguided_classification"] > 0
    assert found["rpn_objectness"] == found["unguided_rpn_objectness"] > 0
    sum(result.values()).backward()
    assert bool(detector.roi_heads.box_predictor.cls_score.weight.grad.any())
    assert all(bool(torch.isfinite(p.grad).all()) for p in detector.parameters())
