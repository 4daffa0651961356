from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import OUT, DeployedDetector, class_nms, decode_boxes
from ghm_triton.detection.models.registry import build_detector

SIZE = (64, 96)


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    corner = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 40
    size = 4 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 30
    return torch.cat([corner, corner + size], dim=-1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_decoding_is_torchvisions_box_coder_and_clipping(generator: torch.Generator) -> None:
    anchors = random_boxes(500, generator=generator)
    deltas = torch.randn(500, 4, generator=generator, dtype=torch.float64) * 2
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    expected = clip_boxes_to_image(coder.decode_single(deltas, anchors), SIZE)
    # Both in float64, in another order of operations.
    torch.testing.assert_close(decode_boxes(deltas, anchors, SIZE), expected, rtol=1e-12, atol=1e-9)


def test_growth_beyond_torchvisions_limit_is_clipped() -> None:
    anchors = torch.tensor([[10.0, 10.0, 10.5, 10.5]])
    grown = decode_boxes(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), anchors, (1000, 1000))
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    expected = coder.decode_single(torch.tensor([[0.0, 0.0, 1e4, 1e4]]), anchors)
    torch.testing.assert_close(grown, clip_boxes_to_image(expected, (1000, 1000)))
    assert float(grown[0, 2] - 10.25) == pytest.approx(0.25 * 1000 / 16)


def test_decoding_broadcasts_over_the_batch(generator: torch.Generator) -> None:
    anchors = random_boxes(7, generator=generator)
    deltas = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    rows = [decode_boxes(deltas[i], anchors, SIZE) for i in range(3)]
    assert torch.equal(decode_boxes(deltas, anchors, SIZE), torch.stack(rows))


def test_a_box_is_clipped_to_height_and_width() -> None:
    whole = decode_boxes(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[20.0, 20, 60, 60]]), SIZE)
    assert whole.tolist() == [[0.0, 0.0, 96.0, 64.0]]


@pytest.mark.parametrize("iou", [0.0, 0.3, 0.7, 1.0])
def test_nms_is_torchvisions_over_images_and_classes(
    generator: torch.Generator, iou: float
) -> None:
    images, classes, count = 3, 4, 60
    boxes = random_boxes(images, count, generator=generator)
    ranks = torch.randn(images, classes, count, generator=generator, dtype=torch.float64)
    ranks[ranks < -0.5] = OUT
    kept = class_nms(boxes, ranks, torch.tensor([iou]), 60)
    for image in range(images):
        entries = torch.nonzero(ranks[image] > OUT)
        chosen = batched_nms(
            boxes[image, entries[:, 1]], ranks[image][tuple(entries.T)], entries[:, 0], iou
        )
        ours = kept[kept[:, 0] == image][:, 1:]
        assert sorted(ours.tolist()) == sorted(entries[chosen].tolist())


def test_entries_that_are_out_neither_stand_nor_suppress() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]]])
    ranks = torch.tensor([[[OUT, -90.0, OUT]]])
    assert class_nms(boxes, ranks, torch.tensor([0.5]), 3).tolist() == [[0, 0, 1]]


def test_nothing_passes() -> None:
    kept = class_nms(torch.zeros(2, 5, 4), torch.full((2, 3, 5), OUT), torch.tensor([0.5]), 5)
    assert kept.shape == (0, 3)
    assert kept.dtype == torch.int64


def test_the_operator_keeps_torch_librarys_rules(generator: torch.Generator) -> None:
    boxes = random_boxes(2, 20, generator=generator).float()
    ranks = torch.randn(2, 3, 20, generator=generator)
    torch.library.opcheck(class_nms, (boxes, ranks, torch.tensor([0.5]), 5))


def deployed(classes: int = 3, candidates: int = 50, max_detections: int = 30) -> DeployedDetector:
    torch.manual_seed(0)
    config = DetectorConfig(
        tuple("abcdefgh"[:classes]),
        SIZE,
        channels=8,
        candidates=candidates,
        max_detections=max_detections,
    )
    return DeployedDetector(build_detector(config).double())


def select(
    deployed: DeployedDetector, logits: Tensor, deltas: Tensor, thresholds: Tensor, iou: Tensor
) -> tuple[Tensor, ...]:
    """What stands of these outputs of the network."""
    boxes = decode_boxes(deltas, deployed.detector.anchors, deployed.config.image_size)
    predictions = Predictions(boxes.unsqueeze(2), logits.sigmoid(), logits)
    return deployed.select(predictions, thresholds, iou)


def iou_of(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def iou_matrix(anchors: Tensor, anchor: Tensor) -> Tensor:
    return torch.tensor([iou_of(a, anchor.tolist()) for a in anchors.tolist()])


def decode(delta: list[float], anchor: list[float]) -> list[float]:
    width, height = anchor[2] - anchor[0], anchor[3] - anchor[1]
    x, y = anchor[0] + width / 2 + delta[0] * width, anchor[1] + height / 2 + delta[1] * height
    limit = math.log(1000 / 16)
    half = [0.5 * width * math.exp(min(delta[2], limit))]
    half += [0.5 * height * math.exp(min(delta[3], limit))]
    box = [x - half[0], y - half[1], x + half[0], y + half[1]]
    return [min(max(v, 0.0), [96.0, 64.0][i % 2]) for i, v in enumerate(box)]


def by_loops(
    logits: list[list[float]],
    deltas: list[list[float]],
    anchors: list[list[float]],
    thresholds: list[float],
    iou: float,
    candidates: int,
    most: int,
) -> list[tuple[float, int, list[float]]]:
    """The whole selection of one image as its definition reads, in Python floats."""
    scores = [[1 / (1 + math.exp(-x)) for x in row] for row in logits]
    passing = [
        {label: s for label, s in enumerate(row) if s >= thresholds[label]} for row in scores
    ]
    ranked = sorted(
        (a for a in range(len(passing)) if passing[a]), key=lambda a: -max(passing[a].values())
    )
    boxes = {a: decode(deltas[a], anchors[a]) for a in ranked[:candidates]}
    kept = []
    for label in range(len(thresholds)):
        own = sorted((a for a in boxes if label in passing[a]), key=lambda a: -passing[a][label])
        survivors: list[int] = []
        for a in own:
            if all(iou_of(boxes[a], boxes[b]) <= iou for b in survivors):
                survivors.append(a)
        kept += [(passing[a][label], label, boxes[a]) for a in survivors]
    return sorted(kept, key=lambda one: -one[0])[:most]


@pytest.mark.parametrize(
    ("thresholds", "iou"),
    [
        ([0.5, 0.6, 0.7], 0.5),
        ([0.9, 0.97, 0.2], 0.1),
        ([0.0, 0.0, 0.0], 0.5),
        ([0.999, 0.999, 0.999], 1.0),
        ([2.0, 2.0, 0.98], 0.3),
    ],
)
def test_selection_is_its_definition(
    generator: torch.Generator, thresholds: list[float], iou: float
) -> None:
    detector = deployed()
    anchors = detector.detector.anchors
    logits = 2 * torch.randn(2, len(anchors), 3, generator=generator, dtype=torch.float64)
    deltas = 0.5 * torch.randn(2, len(anchors), 4, generator=generator, dtype=torch.float64)
    answer = select(
        detector, logits, deltas, torch.tensor(thresholds, dtype=torch.float64), torch.tensor([iou])
    )
    for image, (boxes, scores, labels, count) in enumerate(zip(*answer, strict=True)):
        expected = by_loops(
            logits[image].tolist(),
            deltas[image].tolist(),
            anchors.tolist(),
            thresholds,
            iou,
            detector.config.candidates,
            detector.config.max_detections,
        )
        assert int(count) == len(expected)
        assert labels[:count].tolist() == [one[1] for one in expected]
        # float64 on both sides: only the rounding of exp differs.
        assert scores[:count].tolist() == pytest.approx([one[0] for one in expected], rel=1e-12)
        for box, one in zip(boxes[:count].tolist(), expected, strict=True):
            assert box == pytest.approx(one[2], rel=1e-12, abs=1e-9)
        assert (labels[count:] == -1).all()
        assert not scores[count:].any()
        assert not boxes[count:].any()


def test_a_score_at_its_threshold_stands() -> None:
    detector = deployed(classes=1)
    anchors = detector.detector.anchors
    logits = torch.full((1, len(anchors), 1), -5.0, dtype=torch.float64)
    logits[0, 7] = 0.75
    at = logits[0, 7].sigmoid()
    deltas = torch.zeros(1, len(anchors), 4, dtype=torch.float64)
    for threshold, count in ((at, 1), (torch.nextafter(at, torch.ones_like(at)), 0)):
        assert int(select(detector, logits, deltas, threshold, torch.tensor([0.5]))[3]) == count


def test_of_two_scores_that_are_equal_in_float32_the_higher_logit_stays() -> None:
    """Runtimes differ in the last bit of a sigmoid; which box is shown must not hang on it."""
    detector = deployed(classes=1).float()
    anchors = detector.detector.anchors
    logits = torch.full((1, len(anchors), 1), -5.0)
    overlap = iou_matrix(anchors, anchors[40])
    overlap[40] = 0.0
    twin = int(overlap.argmax())
    logits[0, 40], logits[0, twin] = 18.0, 18.5
    assert torch.equal(logits[0, 40].sigmoid(), logits[0, twin].sigmoid())
    deltas = torch.zeros(1, len(anchors), 4)
    boxes, _, _, count = select(detector, logits, deltas, torch.tensor([0.5]), torch.tensor([0.1]))
    assert int(count) == 1
    assert torch.equal(boxes[0, 0], decode_boxes(deltas[0, twin], anchors[twin], SIZE))


def test_an_anchor_may_show_several_classes() -> None:
    detector = deployed()
    anchors = detector.detector.anchors
    logits = torch.full((1, len(anchors), 3), -5.0, dtype=torch.float64)
    logits[0, 7] = torch.tensor([1.0, 2.0, -5.0])
    deltas = torch.zeros(1, len(anchors), 4, dtype=torch.float64)
    thresholds = torch.full((3,), 0.5, dtype=torch.float64)
    _, _, labels, count = select(detector, logits, deltas, thresholds, torch.tensor([0.5]))
    assert labels[0, : int(count)].tolist() == [1, 0]


def test_padding_is_zero_whatever_the_boxes() -> None:
    detector = deployed()
    anchors = detector.detector.anchors
    logits = torch.full((1, len(anchors), 3), -5.0, dtype=torch.float64)
    deltas = torch.full((1, len(anchors), 4), math.nan, dtype=torch.float64)
    thresholds = torch.full((3,), 0.5, dtype=torch.float64)
    boxes, scores, labels, count = select(detector, logits, deltas, thresholds, torch.tensor([0.5]))
    assert int(count) == 0
    assert (labels == -1).all()
    for padding in (boxes, scores):
        assert torch.equal(padding, torch.zeros_like(padding))
        assert not padding.signbit().any()


def test_scores_that_are_not_numbers_never_stand() -> None:
    detector = deployed()
    anchors = detector.detector.anchors
    logits = torch.full((1, len(anchors), 3), math.nan, dtype=torch.float64)
    deltas = torch.zeros(1, len(anchors), 4, dtype=torch.float64)
    thresholds = torch.zeros(3, dtype=torch.float64)
    assert int(select(detector, logits, deltas, thresholds, torch.tensor([0.5]))[3]) == 0


def test_the_detector_is_in_evaluation_mode() -> None:
    detector = build_detector(DetectorConfig(("a",), SIZE, channels=8)).train()
    assert not any(module.training for module in DeployedDetector(detector).detector.modules())
