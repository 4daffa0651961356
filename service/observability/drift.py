"""Drift: whether the detections of today look like those that the thresholds were made from.

The card holds, for each class, a histogram of the scores of detections on held-out images, those
that matched a ground truth and those that did not. A live detection has no ground truth beside it,
so live scores are compared with the sum of both: all that the detector would have answered there.

The comparison is the population stability index (Siddiqi, Credit Risk Scorecards, 2006) over bins
`b = 1..B`,

    PSI = sum_b (q_b - p_b) ln(q_b / p_b),
    p_b = (r_b + a) / (R + a B),   q_b = (l_b + a) / (L + a B),   a = 1/2,

with `r_b` held-out and `l_b` live detections in bin `b`, `R` and `L` their sums. `a` keeps an empty
bin from making it infinite. Without any drift PSI is about `(1/R + 1/L) chi2(B - 1)`, so its mean
is `(B - 1)(1/R + 1/L)` (`psi_by_chance`): few detections or many bins look like drift.

What keeps the comparison honest:

- Both sides hold only scores at or above the class's threshold, from the first bin of the card's
  that lies above it as a whole (for the policies `f1`, `precision` and `recall` that is the
  threshold itself). So a request with thresholds, classes or an IoU of its own would bend the
  distribution, and is left out: `Monitor.observe` is for the file's own only.
- The bins are the card's fine ones put together, each with about as many held-out detections, and
  as many as keep `psi_by_chance` at or below `CHANCE` once there are `LEAST` live ones, at most
  `MOST_BINS`. A class with too few held-out detections for two bins has no value.
- There is no value below `LEAST` live detections, nor while `psi_by_chance` is above `CHANCE`. For
  the mix of classes, whose bins are given, that may take more: 1,700 detections for 80 classes.
- Live counts fade: each detection of a class takes `1/CLASS_WINDOW` of that class's older ones
  away, so that they stand for the last thousand or so however rare the class is. The mix of
  classes fades by all detections.

What it cannot tell: whether scores are right (a shift may be a change of scenes, and no worse), how
many objects were missed, and how the number of detections an image changed, since the card does
not say how many images were held out. The cap on detections an image was the same on both sides,
but ran over more of them when thresholds were not applied yet: in crowded scenes, held-out counts
of low-scored classes are a little too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.card import DetectorCard

CLASS_WINDOW = 1_000
MIX_WINDOW = 10_000
LEAST = 200
MOST_BINS = 10
CHANCE = 0.05

_SMOOTHING = 0.5

Word = Literal["unknown", "stable", "moderate", "major"]
Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Two histograms over the same bins, and how far apart they are.

    Attributes:
        held_out: Detections on held-out images, `B` counts.
        live: Detections of late, `B` counts, fading and so not whole.
        psi: None where there are too few of either for a value.
        psi_by_chance: The mean of `psi` without any drift; None below `LEAST` live ones.
    """

    held_out: list[int]
    live: list[float]
    psi: float | None
    psi_by_chance: float | None

    @property
    def word(self) -> Word:
        """`stable` below 0.1, `moderate` below 0.25, else `major`; `unknown` without a value."""
        if self.psi is None:
            return "unknown"
        if self.psi < 0.1:
            return "stable"
        return "moderate" if self.psi < 0.25 else "major"


@dataclass(frozen=True)
class ClassDrift:
    """The scores of one class.

    Attributes:
        name: The class.
        threshold: The file's.
        edges: `B + 1` float32 values that bound the bins; the last bin holds its upper edge too.
        scores: The comparison; without bins where there is too little evidence in the card.
    """

    name: str
    threshold: float
    edges: list[float]
    scores: Comparison


class Reference:
    """The held-out side of a card, in the bins that the live side is counted in.

    Args:
        card: The card of the model that answers.

    Attributes:
        edges: One array a class, float32 `[B + 1]`; empty where a class cannot be compared.
        counts: One array a class, int64 `[B]`.
        mix: int64 `[C]`, held-out detections of each class at or above `starts`.
        starts: float32 `[C]`: the score from which both sides count.
    """

    def __init__(self, card: DetectorCard) -> None:
        self.names = card.class_names
        self.thresholds = card.class_thresholds
        self.edges: list[npt.NDArray[np.float32]] = []
        self.counts: list[npt.NDArray[np.int64]] = []
        classes = len(card.class_names)
        self.mix = np.zeros(classes, np.int64)
        self.starts = np.zeros(classes, np.float32)
        for c, threshold in enumerate(card.class_thresholds):
            positive = np.array(card.statistics.positive_scores[c], np.int64)
            negative = np.array(card.statistics.negative_scores[c], np.int64)
            fine = positive + negative if len(positive) == len(negative) else positive[:0]
            first, lower = _first_whole_bin(len(fine), threshold)
            self.mix[c] = fine[first:].sum()
            self.starts[c] = lower[first] if first < len(fine) else np.inf
            edges, counts = _grouped(fine[first:], lower[first:])
            self.edges.append(edges)
            self.counts.append(counts)
        # Row c holds the lower edges of its bins; no score reaches the rest.
        self.lower = np.full((classes, MOST_BINS), np.inf, np.float32)
        for row, edges in zip(self.lower, self.edges, strict=True):
            row[: len(edges[:-1])] = edges[:-1]


def _first_whole_bin(bins: int, threshold: float) -> tuple[int, npt.NDArray[np.float32]]:
    """The first fine bin that no score below the threshold falls in, and all lower edges.

    Edges are float32 of `k / bins`, as where the scores were counted.
    """
    if bins == 0:
        return 0, np.zeros(0, np.float32)
    lower = (np.arange(bins, dtype=np.float64) / bins).astype(np.float32)
    return int(np.searchsorted(lower, np.float32(threshold), side="left")), lower


def _grouped(
    fine: npt.NDArray[np.int64], lower: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Fine bins put together to about equal counts: edges `[B + 1]` and counts `[B]`."""
    total = int(fine.sum())
    wanted = bins_that_chance_allows(total)
    # Bin k begins at the first fine bin with at least k/B of all below it.
    below = np.concatenate([[0], np.cumsum(fine)])[:-1]
    shares = np.arange(wanted) * total / max(wanted, 1)
    begins = np.unique(np.searchsorted(below, shares, side="left").clip(0, max(len(fine) - 1, 0)))
    if wanted < 2 or len(begins) < 2:
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    counts = np.add.reduceat(fine, begins)
    return np.append(lower[begins], np.float32(1.0)), counts


def bins_that_chance_allows(held_out: int) -> int:
    """The most bins, up to `MOST_BINS`, whose PSI by chance is at most `CHANCE`.

    Args:
        held_out: Detections on held-out images.
    """
    if held_out == 0:
        return 1
    return min(MOST_BINS, 1 + math.floor(CHANCE / (1 / held_out + 1 / LEAST)))


class Monitor:
    """The live side of one model. Belongs to the event loop.

    Args:
        card: The model's.
        live: float64 `[C, MOST_BINS + 1]` that holds the live counts: the class's bins, and in the
            last column its part of the mix. Zeros of its own where None; several workers give
            each other's to `report`.
    """

    def __init__(self, card: DetectorCard, live: Counts | None = None) -> None:
        self.reference = Reference(card)
        shape = live_shape(card)
        self.live: Counts = np.zeros(shape) if live is None else live
        if self.live.shape != shape:
            raise ValueError(f"live must be {list(shape)}, got {list(self.live.shape)}")

    def observe(self, scores: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
        """Count detections that were made at the file's own thresholds and IoU.

        Args:
            scores: float32 `[N]`, in [0, 1].
            labels: int64 `[N]`, in `0..C-1`.
        """
        compared = scores >= self.reference.starts[labels]
        scores, labels = scores[compared], labels[compared]
        if not len(scores):
            return
        bins = (scores[:, None] >= self.reference.lower[labels]).sum(axis=1) - 1
        self.live[:, -1] *= (1 - 1 / MIX_WINDOW) ** len(scores)
        fading = np.bincount(labels, minlength=len(self.live))
        self.live[:, -1] += fading
        self.live[:, :-1] *= ((1 - 1 / CLASS_WINDOW) ** fading)[:, None]
        binned = bins >= 0  # a class without bins takes part in the mix only
        np.add.at(self.live, (labels[binned], bins[binned]), 1)

    def classes(self, live: Counts | None = None) -> list[ClassDrift]:
        """The scores of every class, in label order.

        Args:
            live: Live counts of all workers; this one's where None.
        """
        live = self.live if live is None else live
        reference = self.reference
        return [
            ClassDrift(name, threshold, edges.tolist(), _compare(counts, row[: len(counts)]))
            for name, threshold, edges, counts, row in zip(
                reference.names,
                reference.thresholds,
                reference.edges,
                reference.counts,
                live,
                strict=True,
            )
        ]

    def mix(self, live: Counts | None = None) -> Comparison:
        """How detections spread over classes. The bins are the classes, in label order.

        Args:
            live: Live counts of all workers; this one's where None.
        """
        live = self.live if live is None else live
        return _compare(self.reference.mix, live[:, -1])


def live_shape(card: DetectorCard) -> tuple[int, int]:
    """The shape of the live counts of a model."""
    return len(card.class_names), MOST_BINS + 1


def _compare(held_out: npt.NDArray[np.int64], live: Counts) -> Comparison:
    psi = by_chance = None
    expected, seen = int(held_out.sum()), float(live.sum())
    if len(held_out) >= 2 and expected > 0 and seen >= LEAST:
        by_chance = (len(held_out) - 1) * (1 / expected + 1 / seen)
        if by_chance <= CHANCE:
            psi = stability_index(held_out, live)
    return Comparison(held_out.tolist(), live.tolist(), psi, by_chance)


def stability_index(held_out: npt.NDArray[np.int64] | Counts, live: Counts) -> float:
    """The population stability index of two histograms over the same bins.

    Args:
        held_out: `[B]` counts.
        live: `[B]` counts.

    Returns:
        A number that is 0 for equal shares and grows with their distance.
    """
    bins = len(live)
    p = (held_out + _SMOOTHING) / (held_out.sum() + _SMOOTHING * bins)
    q = (live + _SMOOTHING) / (live.sum() + _SMOOTHING * bins)
    return float(((q - p) * np.log(q / p)).sum())
