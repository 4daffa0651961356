"""What training counted: the only evidence that thresholds are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

SCORE_BINS = 200
SCORE_FLOOR = 1 / SCORE_BINS  # held-out detections below it are not recorded


@dataclass
class ClassStatistics:
    """Counts gathered while training and on held-out images.

    Training: `anchors` and `positives` count what the classification loss saw (positive and
    negative anchors, not ignored ones). Held-out: `ground_truths` counts boxes, and detections
    fall into `positive_scores` when they match one (IoU 0.5, each box once, best score first) or
    `negative_scores` when they do not.

    Attributes:
        class_names: The classes in label order, `0..C-1`.
        anchors: Anchors counted.
        positives: int64 `[C]`: anchors assigned to each class.
        ground_truths: int64 `[C]`: held-out boxes of each class.
        positive_scores: int64 `[C, SCORE_BINS]`, equal bins over [0, 1] (see `score_bin`).
        negative_scores: int64 `[C, SCORE_BINS]`.
    """

    class_names: tuple[str, ...]
    anchors: int = 0
    positives: Tensor = field(default_factory=lambda: torch.zeros(0))
    ground_truths: Tensor = field(default_factory=lambda: torch.zeros(0))
    positive_scores: Tensor = field(default_factory=lambda: torch.zeros(0))
    negative_scores: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        classes = len(self.class_names)
        shapes = {
            "positives": (classes,),
            "ground_truths": (classes,),
            "positive_scores": (classes, SCORE_BINS),
            "negative_scores": (classes, SCORE_BINS),
        }
        for name, shape in shapes.items():
            counts: Tensor = getattr(self, name)
            if counts.numel() == 0:
                setattr(self, name, torch.zeros(shape, dtype=torch.int64))
            elif tuple(counts.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(counts.shape)}")

    def add_labels(self, counts: Tensor) -> None:
        """Add anchor counts, int64 `[C + 1]`: of every class, then of background.

        Raises:
            ValueError: The counts have another shape.
        """
        if tuple(counts.shape) != (len(self.class_names) + 1,):
            expected = len(self.class_names) + 1
            raise ValueError(f"counts must be [{expected}], got {list(counts.shape)}")
        self.anchors += int(counts.sum())
        self.positives += counts[:-1].cpu()

    def observe_detections(
        self, scores: Tensor, labels: Tensor, matched: Tensor, ground_truth_labels: Tensor
    ) -> None:
        """Count one held-out image.

        Args:
            scores: `[D]` in [0, 1], of detections before any class threshold.
            labels: int64 `[D]`.
            matched: bool `[D]`: whether the detection found a ground truth of its class.
            ground_truth_labels: int64 `[G]`.

        Raises:
            ValueError: A label is not one of the classes, or a score is not in [0, 1].
        """
        classes = len(self.class_names)
        labels, ground_truth_labels = labels.cpu(), ground_truth_labels.cpu()
        _require_labels("labels", labels, classes)
        _require_labels("ground_truth_labels", ground_truth_labels, classes)
        cell = labels * SCORE_BINS + score_bin(scores.cpu())
        hit = matched.cpu().bool()
        self.ground_truths += torch.bincount(ground_truth_labels, minlength=classes)
        for histogram, chosen in ((self.positive_scores, hit), (self.negative_scores, ~hit)):
            counts = torch.bincount(cell[chosen], minlength=classes * SCORE_BINS)
            histogram += counts.view(classes, SCORE_BINS)

    def forget_held_out(self) -> None:
        """Drop the held-out counts, before the images are scored again with newer weights."""
        for counts in (self.ground_truths, self.positive_scores, self.negative_scores):
            counts.zero_()

    def merge(self, other: Self) -> Self:
        """The sum of two sets of counts, as of two ranks.

        Raises:
            ValueError: They are of different classes.
        """
        if other.class_names != self.class_names:
            raise ValueError(f"classes differ: {self.class_names} and {other.class_names}")
        return type(self)(
            self.class_names,
            self.anchors + other.anchors,
            self.positives + other.positives,
            self.ground_truths + other.ground_truths,
            self.positive_scores + other.positive_scores,
            self.negative_scores + other.negative_scores,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {
            "class_names": list(self.class_names),
            "anchors": self.anchors,
            "positives": self.positives.tolist(),
            "ground_truths": self.ground_truths.tolist(),
            "positive_scores": self.positive_scores.tolist(),
            "negative_scores": self.negative_scores.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is missing, not a number, or has another shape.
        """
        try:
            names: Sequence[str] = values["class_names"]
            counts = {key: torch.tensor(values[key], dtype=torch.int64) for key in _COUNTS}
            anchors = int(values["anchors"])
        except KeyError as error:
            raise ValueError(f"the statistics lack {error}") from error
        except TypeError as error:
            raise ValueError(f"the statistics hold something else than counts: {error}") from error
        for key, count in counts.items():
            if len(names) and count.numel() == 0:
                raise ValueError(f"{key} is empty, but there are {len(names)} classes")
        return cls(tuple(names), anchors, **counts)


_COUNTS = ("positives", "ground_truths", "positive_scores", "negative_scores")


def score_edges() -> Tensor:
    """The lower edges of the score bins, float32 `[SCORE_BINS]`: `k / SCORE_BINS`, rounded."""
    return (torch.arange(SCORE_BINS, dtype=torch.float64) / SCORE_BINS).float()


def score_bin(scores: Tensor) -> Tensor:
    """The histogram bin of each score, int64; the last bin is closed.

    Bin `k` holds the scores from `score_edges()[k]` up to the next edge. The edges are float32, as
    scores and thresholds are: so a score stands at the threshold `k / SCORE_BINS` exactly when its
    bin is `k` or above.

    Raises:
        ValueError: A score is NaN or not in [0, 1].
    """
    outside = ~((scores >= 0) & (scores <= 1))  # written so that NaN is outside
    if bool(outside.any()):
        raise ValueError(f"scores must lie in [0, 1]; got {float(scores[outside][0]):g}")
    return torch.bucketize(scores.float(), score_edges().to(scores.device)[1:], right=True)


def _require_labels(name: str, labels: Tensor, classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.numel():
        raise ValueError(f"{name} must lie in 0..{classes - 1}; got {int(wrong[0])}")
