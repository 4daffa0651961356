"""Comparison of two detectors' outputs for one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from export.card import IOU_INPUT, THRESHOLDS_INPUT

Floats = npt.NDArray[np.float32]
# Padded boxes, scores and labels of one image, and the number of its detections.
Outputs = tuple[Floats, Floats, npt.NDArray[np.int64], int]
# Detections are ranked by logit, and a runtime's sigmoid need not be monotone in its last bits.
LAST_BITS = 1e-6


@dataclass(frozen=True)
class Tolerance:
    """Differences that are explained by the rounding of two runtimes.

    Attributes:
        box: Largest difference of a coordinate, in input pixels.
        score: Largest difference of a score; also how near a score must be to its threshold, to a
            rival's or to the lowest of a full list for rounding to decide.
        iou: How near an overlap must be to the NMS threshold for rounding to decide. Runtimes
            agree to 1e-3 px, which changes the overlap of boxes of 8 px by less than this.
    """

    box: float = 0.1
    score: float = 1e-4
    iou: float = 1e-3


@dataclass(frozen=True, eq=False)
class Setting:
    """The thresholds that both detectors run with.

    Attributes:
        class_names: The classes in label order.
        class_thresholds: float32 `[C]`.
        iou_threshold: Of NMS.
        max_detections: Most detections per image.
        name: The name in reports.
        overridden: The graph inputs that are passed; others keep the file's default.
    """

    class_names: Sequence[str]
    class_thresholds: Floats
    iou_threshold: float
    max_detections: int
    name: str = ""
    overridden: tuple[str, ...] = ()

    @property
    def overrides(self) -> dict[str, Floats]:
        """Values for the overridden inputs, by name."""
        iou = np.array([self.iou_threshold], dtype=np.float32)
        values = {THRESHOLDS_INPUT: self.class_thresholds, IOU_INPUT: iou}
        return {name: values[name] for name in self.overridden}


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections in one image.

    Attributes:
        boxes: float32 `[N, 4]`, x1 y1 x2 y2 in input pixels.
        scores: float32 `[N]`.
        labels: int64 `[N]`.
    """

    boxes: Floats
    scores: Floats
    labels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, outputs: Outputs) -> Detections:
        """The detections in padded outputs."""
        boxes, scores, labels, count = outputs
        return cls(boxes[:count], scores[:count], labels[:count])

    def __len__(self) -> int:
        return len(self.scores)

    def without(self, rows: Sequence[int]) -> Detections:
        """The detections in all other rows."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(rows)] = False
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])


@dataclass(frozen=True, eq=False)
class Proposals:
    """The candidates of one image, before thresholds and NMS.

    Attributes:
        boxes: float32 `[A, 4]`, x1 y1 x2 y2 in input pixels.
        scores: float32 `[A, C]`.
    """

    boxes: Floats
    scores: Floats

    def include(self, detections: Detections, i: int, tolerance: Tolerance) -> bool:
        """Whether detection `i` is one of them, within the tolerances."""
        score = np.abs(self.scores[:, detections.labels[i]] - detections.scores[i])
        box = np.abs(self.boxes - detections.boxes[i]).max(axis=1, initial=0.0)
        return bool(((score <= tolerance.score) & (box <= tolerance.box)).any())


@dataclass
class Comparison:
    """The result of a comparison; results of several images add up.

    Attributes:
        matched: Detections on both sides, by label, int64 `[C]`.
        box: Largest difference of a coordinate between matched detections, in pixels.
        score: Largest difference of a score between matched detections.
        borderline: Detections on one side that rounding explains: the score is at its threshold or
            at the lowest of a full list, NMS had to choose between equals, or the overlap is at
            the NMS threshold.
        mismatches: Descriptions of the other detections on one side.
    """

    matched: npt.NDArray[np.int64]
    box: float = 0.0
    score: float = 0.0
    borderline: int = 0
    mismatches: list[str] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Add the result of another comparison."""
        self.matched += other.matched
        self.box = max(self.box, other.box)
        self.score = max(self.score, other.score)
        self.borderline += other.borderline
        self.mismatches += other.mismatches


def compare(
    expected: Detections,
    found: Detections,
    proposals: Proposals,
    setting: Setting,
    tolerance: Tolerance,
) -> Comparison:
    """Match the detections of one image one to one, in any order.

    Args:
        expected: The checkpoint's detections.
        found: The file's detections.
        proposals: The checkpoint's proposals.
        setting: The thresholds of both.
        tolerance: How far a matched pair may differ.
    """
    box = np.abs(expected.boxes[:, None] - found.boxes[None]).max(axis=2, initial=0.0)
    score = np.abs(expected.scores[:, None] - found.scores[None])
    pairs = _pairs(expected, found, box, score, tolerance)
    result = Comparison(np.zeros(len(setting.class_names), dtype=np.int64))
    for i, j in pairs:
        result.matched[expected.labels[i]] += 1
        result.box = max(result.box, float(box[i, j]))
        result.score = max(result.score, float(score[i, j]))
    missing = expected.without([i for i, _ in pairs])
    extra = found.without([j for _, j in pairs])
    # Rounding changes a choice between proposals; it never creates a detection.
    genuine = [j for j in range(len(extra)) if proposals.include(extra, j, tolerance)]
    invented = [j for j in range(len(extra)) if j not in genuine]
    sides = (
        ("checkpoint", "file", missing, expected, found, extra.without(invented)),
        ("file", "checkpoint", extra, found, expected, missing),
    )
    for side, other_side, alone, its, others, others_alone in sides:
        for i in range(len(alone)):
            excusable = alone is missing or i in genuine
            if excusable and _rounding_decides(
                alone, i, its, others, others_alone, setting, tolerance
            ):
                result.borderline += 1
            else:
                text = _describe(alone, i, others, setting.class_names)
                result.mismatches.append(text.format(side=side, other_side=other_side))
    return result


def _pairs(
    expected: Detections, found: Detections, box: Floats, score: Floats, tolerance: Tolerance
) -> list[tuple[int, int]]:
    """Pairs of one class within the tolerances, nearest first, each detection once."""
    same = expected.labels[:, None] == found.labels[None]
    allowed = same & (box <= tolerance.box) & (score <= tolerance.score)
    distance = box / tolerance.box + score / tolerance.score
    candidates = np.argwhere(allowed)[np.argsort(distance[allowed], kind="stable")]
    pairs: list[tuple[int, int]] = []
    for i, j in candidates.tolist():
        if all(i != row and j != column for row, column in pairs):
            pairs.append((i, j))
    return pairs


def _rounding_decides(
    alone: Detections,
    i: int,
    its: Detections,
    others: Detections,
    others_alone: Detections,
    setting: Setting,
    tolerance: Tolerance,
) -> bool:
    """Whether rounding explains that detection `i` of `alone` is on its side only."""
    score, label, box = alone.scores[i], alone.labels[i], alone.boxes[i]
    if abs(score - setting.class_thresholds[label]) <= tolerance.score:
        return True
    for side in (its, others):
        full = len(side) >= setting.max_detections
        if full and score <= side.scores.min() + tolerance.score:
            return True
    # Suppressed on the other side by a better box whose overlap is at the NMS threshold ...
    better = (others.labels == label) & (others.scores >= score - tolerance.score)
    at_threshold = np.abs(_iou(box, others.boxes) - setting.iou_threshold) <= tolerance.iou
    # ... or by a box with the same score, which this side suppressed in turn.
    equal = np.abs(others_alone.scores - score) <= tolerance.score
    overlaps = _iou(box, others_alone.boxes) > setting.iou_threshold
    rival = (others_alone.labels == label) & equal & overlaps
    return bool((better & at_threshold).any() or rival.any())


def _iou(box: Floats, boxes: Floats) -> Floats:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    overlap: Floats = intersection / np.maximum(areas - intersection, np.float32(1e-9))
    return overlap


def _describe(alone: Detections, i: int, others: Detections, names: Sequence[str]) -> str:
    """Describe a detection, and the nearest one of its class on the other side."""
    corners = ", ".join(f"{value:.2f}" for value in alone.boxes[i].tolist())
    text = (
        f"{names[alone.labels[i]]} {alone.scores[i]:.5f} at [{corners}]"
        " is in the {side}, not in the {other_side}"
    )
    rivals = np.flatnonzero(others.labels == alone.labels[i])
    if not len(rivals):
        return f"{text}, which has none of its class"
    apart = np.abs(others.boxes[rivals] - alone.boxes[i]).max(axis=1)
    nearest = rivals[apart.argmin()]
    return f"{text}; its nearest scores {others.scores[nearest]:.5f}, {apart.min():.2f} px away"


def split_batch(outputs: Sequence[npt.NDArray[Any]]) -> list[Outputs]:
    """Split the outputs for a batch, in the order of `export.card.OUTPUTS`, by image."""
    boxes, scores, labels, counts = outputs
    return [(boxes[i], scores[i], labels[i], int(counts[i])) for i in range(len(counts))]


def contract_violations(outputs: Outputs, setting: Setting) -> list[str]:
    """Describe each violation of the file's contract by the padded outputs for one image."""
    boxes, scores, labels, count = outputs
    if not 0 <= count <= len(scores):
        return [f"num_detections is {count} of {len(scores)}"]
    if not ((labels[:count] >= 0) & (labels[:count] < len(setting.class_names))).all():
        return [f"a label is none of 0..{len(setting.class_names) - 1}"]
    violations = []
    if (labels[count:] != -1).any() or scores[count:].any() or boxes[count:].any():
        violations.append("the padding is not 0, 0 and -1")
    if (np.diff(scores[:count]) > LAST_BITS).any():
        violations.append("the scores do not fall")
    if not (scores[:count] >= setting.class_thresholds[labels[:count]]).all():
        violations.append("a score lies below its class's threshold")
    return violations
