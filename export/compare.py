"""Are these the same detections? Two lists of one image, matched one to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Tolerance:
    """How far two equal detectors may differ, by the rounding of their runtimes.

    Attributes:
        box: Largest difference of a coordinate, in input pixels.
        score: Largest difference of a score; also how near a score must lie to its threshold, to
            a rival's or to the last place for rounding to decide.
        iou: How near an overlap must lie to NMS's threshold for rounding to decide: runtimes
            agree to 1e-3 px, which moves the overlap of boxes of 8 px by less than this.
    """

    box: float = 0.1
    score: float = 1e-4
    iou: float = 1e-3


@dataclass(frozen=True, eq=False)
class Detections:
    """What one detector finds in one image.

    Attributes:
        boxes: float32 `[N, 4]`, x1 y1 x2 y2 in input pixels.
        scores: float32 `[N]`.
        labels: int64 `[N]`.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Rules:
    """What both detectors were asked for.

    Attributes:
        class_names: The classes in label order.
        class_thresholds: float32 `[C]`.
        iou_threshold: Of NMS.
        capacity: Most detections an image.
    """

    class_names: Sequence[str]
    class_thresholds: npt.NDArray[np.float32]
    iou_threshold: float
    capacity: int


@dataclass
class Comparison:
    """What a comparison found; comparisons of several images add up.

    Attributes:
        matched: Detections found by both, by label, int64 `[C]`.
        box: Largest difference of a coordinate between matched detections, in pixels.
        score: Largest difference of a score between matched detections.
        borderline: Detections of one side alone, that rounding explains: the score lies at its
            threshold or at the last place of a full list, or NMS had to choose between equals.
        mismatches: Detections of one side alone that nothing explains, in words.
    """

    matched: npt.NDArray[np.int64]
    box: float = 0.0
    score: float = 0.0
    borderline: int = 0
    mismatches: list[str] = field(default_factory=list)

    def add(self, other: Comparison) -> None:
        """Take another comparison's findings in."""
        self.matched += other.matched
        self.box = max(self.box, other.box)
        self.score = max(self.score, other.score)
        self.borderline += other.borderline
        self.mismatches += other.mismatches


def compare(
    expected: Detections, found: Detections, rules: Rules, tolerance: Tolerance
) -> Comparison:
    """Match the detections of one image one to one, whatever their order.

    Args:
        expected: The checkpoint's.
        found: The file's.
        rules: What both were asked for.
        tolerance: How far a matched pair may differ.
    """
    box = np.abs(expected.boxes[:, None] - found.boxes[None]).max(axis=2, initial=0.0)
    score = np.abs(expected.scores[:, None] - found.scores[None])
    pairs = _pairs(expected, found, box, score, tolerance)
    result = Comparison(np.zeros(len(rules.class_names), dtype=np.int64))
    for i, j in pairs:
        result.matched[expected.labels[i]] += 1
        result.box = max(result.box, float(box[i, j]))
        result.score = max(result.score, float(score[i, j]))
    sides = (("checkpoint", expected, found, 0), ("file", found, expected, 1))
    for side, own, other, place in sides:
        for i in sorted(set(range(len(own))) - {pair[place] for pair in pairs}):
            if _rounding_decides(own, i, other, rules, tolerance):
                result.borderline += 1
            else:
                result.mismatches.append(_describe(side, own, i, other, rules.class_names))
    return result


def _pairs(
    expected: Detections,
    found: Detections,
    box: npt.NDArray[np.float32],
    score: npt.NDArray[np.float32],
    tolerance: Tolerance,
) -> list[tuple[int, int]]:
    """Pairs of one class within the tolerances, nearest first, each detection once."""
    same = expected.labels[:, None] == found.labels[None]
    allowed = same & (box <= tolerance.box) & (score <= tolerance.score)
    distance = box / tolerance.box + score / tolerance.score
    candidates = np.argwhere(allowed)
    order = np.argsort(distance[allowed], kind="stable")
    pairs, taken, given = [], set(), set()
    for i, j in candidates[order].tolist():
        if i not in taken and j not in given:
            taken.add(i)
            given.add(j)
            pairs.append((i, j))
    return pairs


def _rounding_decides(
    own: Detections, i: int, other: Detections, rules: Rules, tolerance: Tolerance
) -> bool:
    """Whether differences within the tolerance explain that only one side shows detection `i`."""
    score, label = own.scores[i], own.labels[i]
    if abs(score - rules.class_thresholds[label]) <= tolerance.score:
        return True
    for side in (own, other):
        if len(side) >= rules.capacity and score <= side.scores.min() + tolerance.score:
            return True
    rivals = (other.labels == label) & (other.scores >= score - tolerance.score)
    overlap = _iou(own.boxes[i], other.boxes)
    at_threshold = np.abs(overlap - rules.iou_threshold) <= tolerance.iou
    equals = (overlap > rules.iou_threshold) & (np.abs(other.scores - score) <= tolerance.score)
    return bool((rivals & (at_threshold | equals)).any())


def _iou(box: npt.NDArray[np.float32], boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    intersection = (high - low).clip(min=0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    union = areas - intersection
    overlap: npt.NDArray[np.float32] = intersection / np.maximum(union, np.float32(1e-9))
    return overlap


def _describe(side: str, own: Detections, i: int, other: Detections, names: Sequence[str]) -> str:
    """A detection that the other side lacks, and the nearest that it has."""
    missing = "file" if side == "checkpoint" else "checkpoint"
    corners = ", ".join(f"{value:.2f}" for value in own.boxes[i].tolist())
    text = (
        f"{names[own.labels[i]]} {own.scores[i]:.5f} at [{corners}]"
        f" is in the {side}, not in the {missing}"
    )
    rivals = np.flatnonzero(other.labels == own.labels[i])
    if not len(rivals):
        return f"{text}, which has none of its class"
    apart = np.abs(other.boxes[rivals] - own.boxes[i]).max(axis=1)
    nearest = rivals[apart.argmin()]
    return f"{text}; its nearest scores {other.scores[nearest]:.5f}, {apart.min():.2f} px away"
