"""Counts from training and from held-out images, from which thresholds are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema

SCORE_BINS = 200
SCORE_FLOOR = 1 / SCORE_BINS  # held-out detections below it are not recorded

Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

_CHECKED_LATER = PlainValidator(lambda values: values)  # by `ClassStatistics.__post_init__`
_AS_LISTS = PlainSerializer(lambda counts: counts.tolist())
_LIST: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_LISTS = {"type": "array", "items": _LIST}
Counts = Annotated[Integers, _CHECKED_LATER, _AS_LISTS, WithJsonSchema(_LIST)]
Histograms = Annotated[Integers, _CHECKED_LATER, _AS_LISTS, WithJsonSchema(_LISTS)]
_ZERO: Integers = np.zeros(0, np.int64)  # stands for zeros of the shape that is needed


@dataclass(eq=False)
class ClassStatistics:
    """Counts gathered in training and on held-out images.

    Training: `anchors` and `positives` count the entries of the classification loss, positive and
    negative anchors without the ignored ones. Held-out: `ground_truths` counts boxes; a detection
    counts in `positive_scores` if it matches one (IoU 0.5, each box once, best score first) and in
    `negative_scores` otherwise. Counts that are left out are zero.

    Arrays, sequences and torch tensors on any device are accepted; the attributes are copies, numpy
    arrays of int64.

    Attributes:
        class_names: The classes in label order, `0..C-1`. Not serialized by pydantic: the card of
            a file has them beside its statistics.
        anchors: Anchors counted.
        positives: `[C]`, anchors assigned to each class.
        ground_truths: `[C]`, held-out boxes of each class.
        positive_scores: `[C, B]`, equal bins over [0, 1] (see `score_bin`); `B` is `SCORE_BINS`
            unless counts with another number of bins are passed.
        negative_scores: `[C, B]`.

    Raises:
        ValueError: Counts are negative, are not integers or have another shape.

    Example:
        >>> statistics = ClassStatistics(("cat", "dog"))
        >>> statistics.add_labels([3, 1, 96])  # cats, dogs, background
        >>> statistics.anchors, statistics.positives
        (100, array([3, 1]))
    """

    __pydantic_config__ = ConfigDict(
        extra="forbid", json_schema_serialization_defaults_required=True
    )

    class_names: Annotated[tuple[str, ...], Field(exclude=True)]
    anchors: Count = 0
    positives: Counts = field(default_factory=lambda: _ZERO)
    ground_truths: Counts = field(default_factory=lambda: _ZERO)
    positive_scores: Histograms = field(default_factory=lambda: _ZERO)
    negative_scores: Histograms = field(default_factory=lambda: _ZERO)

    def __post_init__(self) -> None:
        self.class_names = tuple(self.class_names)
        anchors = _integers("anchors", self.anchors)
        if anchors.ndim:
            raise ValueError(f"anchors must be one number, got {list(anchors.shape)}")
        self.anchors = int(anchors)
        counts = {name: _integers(name, getattr(self, name)) for name in _COUNTS}
        bins = {each.shape[1] for each in counts.values() if each.ndim == 2} or {SCORE_BINS}
        for name, values in counts.items():
            shape = (len(self.class_names), *([max(bins)] if name in _HISTOGRAMS else []))
            if getattr(self, name) is _ZERO:
                values = np.zeros(shape, np.int64)
            elif values.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
            setattr(self, name, values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassStatistics) and self.to_dict() == other.to_dict()

    def add_labels(self, counts: Any) -> None:
        """Add the anchors of a batch.

        Args:
            counts: Integers `[C + 1]`: anchors of every class, then of background.

        Raises:
            ValueError: The counts have another shape or are not integers.
        """
        counts, expected = _integers("counts", counts), len(self.class_names) + 1
        if counts.shape != (expected,):
            raise ValueError(f"counts must be [{expected}], got {list(counts.shape)}")
        self.anchors += int(counts.sum())
        self.positives += counts[:-1]

    def observe_detections(
        self, scores: Any, labels: Any, matched: Any, ground_truth_labels: Any
    ) -> None:
        """Count the detections and boxes of one held-out image.

        Args:
            scores: `[D]` in [0, 1], of detections before any class threshold.
            labels: Integers `[D]` in `0..C-1`.
            matched: Booleans `[D]`: whether the detection matches a ground truth of its class.
            ground_truth_labels: Integers `[G]` in `0..C-1`.

        Raises:
            ValueError: A label is not one of the classes, or a score is not in [0, 1].
        """
        classes, bins = self.positive_scores.shape
        labels = _labels("labels", labels, classes)
        truths = _labels("ground_truth_labels", ground_truth_labels, classes)
        cells, hits = labels * bins + score_bin(scores, bins), _as_array(matched).astype(bool)
        self.ground_truths += np.bincount(truths, minlength=classes)
        for histogram, chosen in ((self.positive_scores, hits), (self.negative_scores, ~hits)):
            histogram += np.bincount(cells[chosen], minlength=classes * bins).reshape(classes, bins)

    def forget_held_out(self) -> None:
        """Reset the held-out counts, before the images are scored again with newer weights."""
        for name in _HELD_OUT:
            getattr(self, name).fill(0)

    def merge(self, other: Self) -> Self:
        """Return the sum of both counts, such as those of two ranks.

        Raises:
            ValueError: The classes differ.
        """
        if other.class_names != self.class_names:
            raise ValueError(f"classes differ: {self.class_names} and {other.class_names}")
        sums = {name: getattr(self, name) + getattr(other, name) for name in ("anchors", *_COUNTS)}
        return type(self)(self.class_names, **sums)

    def reaching(self, label: int) -> tuple[Floats, Floats]:
        """Count the detections of a class that reach each edge of the score bins.

        Returns:
            Matched and unmatched detections, float64 `[B + 1]`: entry `k` counts those in bin `k`
            or above, and the last, past every bin, is 0.
        """
        hits, misses = (
            np.append(counts[label][::-1].cumsum()[::-1], 0).astype(np.float64)
            for counts in (self.positive_scores, self.negative_scores)
        )
        return hits, misses

    def precision_recall(self, label: int) -> tuple[Floats, Floats]:
        """Compute held-out precision and recall of a class at each edge of the score bins.

        Returns:
            Two float64 `[B + 1]`, at the thresholds `k / B`. Precision is NaN where no detection
            reaches the edge; recall is NaN without held-out boxes.
        """
        hits, misses = self.reaching(label)
        with np.errstate(invalid="ignore"):
            return hits / (hits + misses), hits / (self.ground_truths[label] or np.nan)

    def precision_recall_at(
        self, label: int, threshold: float
    ) -> tuple[float | None, float | None]:
        """Compute held-out precision and recall of a class at one threshold, a float32 in [0, 1].

        A threshold between two edges is credited with the bins that lie wholly above it; above the
        last edge there is none.

        Returns:
            Precision, None if no detection reaches the threshold, and recall, None without
            held-out boxes.
        """
        edges = score_edges(self.positive_scores.shape[1])
        index = int(np.searchsorted(edges, np.float32(threshold)))
        shares = (float(curve[index]) for curve in self.precision_recall(label))
        precision, recall = (None if np.isnan(share) else share for share in shares)
        return precision, recall

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, ready for JSON."""
        counts = {name: getattr(self, name).tolist() for name in _COUNTS}
        return {"class_names": list(self.class_names), "anchors": self.anchors, **counts}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` returns.

        Raises:
            ValueError: A field is missing, unknown, not a count, or has another shape.
        """
        names = {each.name for each in fields(cls)}
        if missing := sorted(names - set(values)):
            raise ValueError(f"the statistics lack {missing[0]!r}")
        if unknown := sorted(set(values) - names):
            raise ValueError(f"the statistics have an unknown field {unknown[0]!r}")
        return cls(**values)


_HISTOGRAMS = ("positive_scores", "negative_scores")
_HELD_OUT = ("ground_truths", *_HISTOGRAMS)
_COUNTS = ("positives", *_HELD_OUT)


def as_float32(value: float) -> float:
    """Round to float32, the precision in which scores and thresholds are compared everywhere.

    Example:
        >>> as_float32(0.1)
        0.10000000149011612
    """
    return float(np.float32(value))


def score_edges(bins: int = SCORE_BINS) -> npt.NDArray[np.float32]:
    """Return the lower edges of the score bins, float32 `[bins]`: `k / bins`, rounded."""
    return (np.arange(bins) / max(bins, 1)).astype(np.float32)


def score_bin(scores: Any, bins: int = SCORE_BINS) -> Integers:
    """Return the histogram bin of each score.

    Bin `k` holds the scores from `score_edges()[k]` up to the next edge; the last bin is closed.
    The edges are float32, as scores and thresholds are, so a score reaches the threshold
    `k / bins` exactly if its bin is `k` or above.

    Args:
        scores: Any shape, in [0, 1].
        bins: Number of bins.

    Returns:
        int64, of the shape of `scores`.

    Raises:
        ValueError: A score is NaN or not in [0, 1].

    Example:
        >>> score_bin([0.0, 0.005, 1.0]).tolist()
        [0, 1, 199]
    """
    scores = _as_array(scores)
    outside = ~((scores >= 0) & (scores <= 1))  # NaN is outside too
    if outside.any():
        raise ValueError(f"scores must lie in [0, 1]; got {scores[outside][0]:g}")
    return np.asarray(np.digitize(scores.astype(np.float32), score_edges(bins)[1:]), np.int64)


def _as_array(values: Any) -> npt.NDArray[Any]:
    if hasattr(values, "detach"):  # a torch tensor: it may need gradients, or lie on another device
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def _integers(name: str, values: Any) -> Integers:
    try:
        array = _as_array(values)
    except ValueError as error:  # ragged
        raise ValueError(f"{name} must be an array of integers: {error}") from error
    if array.size and (array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max):
        raise ValueError(f"{name} must hold integers of 64 bits, got {array.dtype}")
    if array.size and array.min() < 0:
        raise ValueError(f"{name} must not be negative, got {array.min()}")
    return array.astype(np.int64)


def _labels(name: str, values: Any, classes: int) -> Integers:
    labels = _as_array(values)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise ValueError(f"{name} must lie in 0..{classes - 1}; got {wrong[0]}")
    return labels.astype(np.int64)
