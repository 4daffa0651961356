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

    def without(self, rows: Sequence[int]) -> Detections:
        """The others."""
        keep = np.ones(len(self), dtype=bool)
        keep[list(rows)] = False
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])


@dataclass(frozen=True, eq=False)
class Proposals:
    """All that a detector proposes for one image, before thresholds and NMS choose.

    Attributes:
        boxes: float32 `[A, 4]`, x1 y1 x2 y2 in input pixels.
        scores: float32 `[A, C]`.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]

    def hold(self, detections: Detections, i: int, tolerance: Tolerance) -> bool:
        """Whether detection `i` is one of them, within the tolerances."""
        score = np.abs(self.scores[:, detections.labels[i]] - detections.scores[i])
        box = np.abs(self.boxes - detections.boxes[i]).max(axis=1, initial=0.0)
        return bool(((score <= tolerance.score) & (box <= tolerance.box)).any())


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
            threshold or at the last place of a full list, NMS had to choose between equals, or
            the overlap lies at NMS's threshold.
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
    expected: Detections,
    found: Detections,
    proposals: Proposals,
    rules: Rules,
    tolerance: Tolerance,
) -> Comparison:
    """Match the detections of one image one to one, whatever their order.

    Args:
        expected: The checkpoint's.
        found: The file's.
        proposals: What the checkpoint had to choose from.
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
    missing = expected.without([i for i, _ in pairs])
    extra = found.without([j for _, j in pairs])
    # Rounding moves a choice between proposals; it never makes a detection out of nothing.
    genuine = [proposals.hold(extra, j, tolerance) for j in range(len(extra))]
    chosen_instead = extra.without([j for j, held in enumerate(genuine) if not held])
    for i in range(len(missing)):
        if _rounding_decides(missing, i, expected, found, chosen_instead, rules, tolerance):
            result.borderline += 1
        else:
            result.mismatches.append(_describe("checkpoint", missing, i, found, rules.class_names))
    for j, held in enumerate(genuine):
        if held and _rounding_decides(extra, j, found, expected, missing, rules, tolerance):
            result.borderline += 1
        else:
            result.mismatches.append(_describe("file", extra, j, expected, rules.class_names))
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
    alone: Detections,
    i: int,
    own: Detections,
    other: Detections,
    other_alone: Detections,
    rules: Rules,
    tolerance: Tolerance,
) -> bool:
    """Whether rounding explains that only one side (`own`) shows detection `i` of `alone`."""
    score, label, box = alone.scores[i], alone.labels[i], alone.boxes[i]
    if abs(score - rules.class_thresholds[label]) <= tolerance.score:
        return True
    for side in (own, other):
        if len(side) >= rules.capacity and score <= side.scores.min() + tolerance.score:
            return True
    # Suppressed on the other side by a better box, at an overlap that is or is not too much ...
    better = (other.labels == label) & (other.scores >= score - tolerance.score)
    at_threshold = np.abs(_iou(box, other.boxes) - rules.iou_threshold) <= tolerance.iou
    # ... or by its equal, which this side suppressed in turn.
    equal = (other_alone.labels == label) & (np.abs(other_alone.scores - score) <= tolerance.score)
    rival = equal & (_iou(box, other_alone.boxes) > rules.iou_threshold)
    return bool((better & at_threshold).any() or rival.any())


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
