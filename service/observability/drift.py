r"""Drift of live detections from those that the thresholds were derived from.

The card holds, per class, a histogram of the scores of detections on held-out images, matched and
unmatched. Live detections have no ground truth, so their scores are compared with the sum of both.

The comparison is the population stability index (Siddiqi, Credit Risk Scorecards, 2006) over bins
$b = 1..B$,

$$ PSI = \sum_b (q_b - p_b) \ln(q_b / p_b), \quad
   p_b = (r_b + a) / (R + a B), \quad q_b = (l_b + a) / (L + a B), \quad a = 1/2, $$

with $r_b$ held-out and $l_b$ live detections in bin $b$, and $R$ and $L$ their sums. $a$ keeps the
index finite where a bin is empty. Without drift, PSI is about $(1/R + 1/L) \chi^2_{B-1}$, with the
mean $(B - 1)(1/R + 1/L)$ (`psi_by_chance`): few detections or many bins look like drift.

Therefore:

- Both sides count only scores at or above the class's threshold, from the first bin of the card
  that lies wholly above it (for the policies `f1`, `precision` and `recall`, the threshold itself).
  Requests with other thresholds, classes or IoU are left out, since they change the distribution.
- The card's bins are merged into bins of about equal held-out counts, at most `MOST_BINS`, and as
  few as keep `psi_by_chance` at or below `CHANCE` with `LEAST` live detections. A class with too
  few held-out detections for two bins has no value.
- There is no value below `LEAST` live detections, nor while `psi_by_chance` is above `CHANCE`. For
  the mix of classes, whose bins are fixed, that takes more: 1,700 detections for 80 classes.
- Live counts decay: each detection of a class takes `1/CLASS_WINDOW` from that class's older
  counts, so that they stand for about the last thousand, however rare the class is. The mix of
  classes decays with all detections.

The index cannot tell whether scores are right (a shift may be a change of scenes), how many objects
were missed, or how the number of detections per image changed, since the card does not hold the
number of held-out images. The limit of detections per image applied on the held-out side before
thresholds did: in crowded scenes, held-out counts of low-scored classes are slightly too low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from export.card import DetectorCard
from ghm_triton.evidence.statistics import score_edges

CLASS_WINDOW = 1_000
MIX_WINDOW = 10_000
LEAST = 200
MOST_BINS = 10
CHANCE = 0.05

_SMOOTHING = 0.5

Word = Literal["unknown", "stable", "moderate", "major"]
Counts = npt.NDArray[np.float64]
Edges = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """Two histograms over the same bins, and their distance.

    Attributes:
        held_out: `B` counts of detections on held-out images.
        live: `B` counts of recent detections, decayed and so not integers.
        psi: None if there are too few of either.
        psi_by_chance: Mean of `psi` without drift; None below `LEAST` live detections.
    """

    held_out: list[int]
    live: list[float]
    psi: float | None
    psi_by_chance: float | None

    @classmethod
    def of(cls, held_out: Integers, live: Counts) -> Comparison:
        """Compare two histograms of shape `[B]`."""
        psi = by_chance = None
        expected, seen = int(held_out.sum()), float(live.sum())
        if len(held_out) >= 2 and expected > 0 and seen >= LEAST:
            by_chance = (len(held_out) - 1) * (1 / expected + 1 / seen)
            if by_chance <= CHANCE:
                psi = stability_index(held_out, live)
        return cls(held_out.tolist(), live.tolist(), psi, by_chance)

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
    """Drift of the scores of one class.

    Attributes:
        name: Name of the class.
        threshold: Threshold in the file.
        edges: `B + 1` edges of the bins; the last bin is closed.
        scores: The comparison; without bins if the card has too little evidence.
    """

    name: str
    threshold: float
    edges: list[float]
    scores: Comparison


class Monitor:
    """Held-out and live counts of one model. Methods must be called on the event loop.

    Args:
        card: The model's card.
        live: float64 `[C, MOST_BINS + 1]`, the live counts: per class its bins, and in the last
            column its share of the mix. None for zeros; several workers pass memory that the
            others can read.

    Attributes:
        edges: Edges of the bins per class, float32 `[B + 1]`; empty if it cannot be compared.
        held_out: Held-out counts per class, int64 `[B]`.
        held_out_mix: int64 `[C]`, held-out detections per class at or above `starts`.
        starts: float32 `[C]`, score from which both sides count.
        live: As passed.
    """

    def __init__(self, card: DetectorCard, live: Counts | None = None) -> None:
        shape = live_shape(card)
        self.live: Counts = np.zeros(shape) if live is None else live
        if self.live.shape != shape:
            raise ValueError(f"live must be {list(shape)}, got {list(self.live.shape)}")
        self._names, self.thresholds = card.class_names, card.class_thresholds
        scores = card.statistics.positive_scores + card.statistics.negative_scores
        lower = score_edges(scores.shape[1])
        self.edges: list[Edges] = []
        self.held_out: list[Integers] = []
        self.held_out_mix = np.zeros(shape[0], np.int64)
        self.starts = np.full(shape[0], np.inf, np.float32)
        # Row c holds the lower edges of the bins of class c; no score reaches the rest.
        self._lower = np.full((shape[0], MOST_BINS), np.inf, np.float32)
        for c, threshold in enumerate(self.thresholds):
            first = int(np.searchsorted(lower, np.float32(threshold)))
            self.held_out_mix[c] = scores[c, first:].sum()
            self.starts[c] = lower[first] if first < len(lower) else np.inf
            edges, counts = _merged(scores[c, first:], lower[first:])
            self._lower[c, : len(counts)] = edges[:-1]
            self.edges.append(edges)
            self.held_out.append(counts)

    def observe(self, scores: npt.NDArray[np.float32], labels: Integers) -> None:
        """Count detections that were made with the file's own thresholds and IoU.

        Args:
            scores: float32 `[N]`, in [0, 1].
            labels: int64 `[N]`, in `0..C-1`.
        """
        compared = scores >= self.starts[labels]
        scores, labels = scores[compared], labels[compared]
        if not len(scores):
            return
        bins = (scores[:, None] >= self._lower[labels]).sum(axis=1) - 1
        counts = np.bincount(labels, minlength=len(self.live))
        self.live[:, -1] *= (1 - 1 / MIX_WINDOW) ** len(scores)
        self.live[:, -1] += counts
        self.live[:, :-1] *= ((1 - 1 / CLASS_WINDOW) ** counts)[:, None]
        binned = bins >= 0  # a class without bins is part of the mix only
        np.add.at(self.live, (labels[binned], bins[binned]), 1)

    def classes(self, live: Counts | None = None) -> list[ClassDrift]:
        """Compare the scores of every class, in label order.

        Args:
            live: Live counts of all workers; None for this one's.
        """
        live = self.live if live is None else live
        scores = [
            Comparison.of(counts, row[: len(counts)])
            for counts, row in zip(self.held_out, live, strict=True)
        ]
        edges = [edges.tolist() for edges in self.edges]
        return list(map(ClassDrift, self._names, self.thresholds, edges, scores))

    def mix(self, live: Counts | None = None) -> Comparison:
        """Compare how detections spread over classes. The bins are the classes, in label order.

        Args:
            live: Live counts of all workers; None for this one's.
        """
        return Comparison.of(self.held_out_mix, (self.live if live is None else live)[:, -1])


def live_shape(card: DetectorCard) -> tuple[int, int]:
    """Return the shape of a model's live counts."""
    return len(card.class_names), MOST_BINS + 1


def bins_that_chance_allows(held_out: int) -> int:
    """Return the most bins, up to `MOST_BINS`, whose PSI by chance is at most `CHANCE`.

    Args:
        held_out: Number of detections on held-out images.
    """
    if held_out == 0:
        return 1
    return min(MOST_BINS, 1 + math.floor(CHANCE / (1 / held_out + 1 / LEAST)))


def _merged(fine: Integers, lower: Edges) -> tuple[Edges, Integers]:
    """Merge fine bins into bins of about equal counts: edges `[B + 1]` and counts `[B]`."""
    total = int(fine.sum())
    bins = bins_that_chance_allows(total)
    # Bin k starts at the first fine bin with at least k/B of all counts below it.
    below = np.cumsum(fine) - fine
    shares = np.arange(bins) * total / bins
    starts = np.unique(np.searchsorted(below, shares).clip(0, max(len(fine) - 1, 0)))
    if len(starts) < 2:
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    return np.append(lower[starts], np.float32(1.0)), np.add.reduceat(fine, starts)


def stability_index(held_out: Integers | Counts, live: Counts) -> float:
    """Return the population stability index of two histograms over the same bins.

    Args:
        held_out: `[B]` counts.
        live: `[B]` counts.

    Returns:
        0 for equal shares, growing with their distance.

    Example:
        >>> stability_index(np.array([10, 10]), np.array([20.0, 20.0]))
        0.0
        >>> round(stability_index(np.array([10, 30]), np.array([30.0, 10.0])), 2)
        1.04
    """
    bins = len(live)
    p = (held_out + _SMOOTHING) / (held_out.sum() + _SMOOTHING * bins)
    q = (live + _SMOOTHING) / (live.sum() + _SMOOTHING * bins)
    return float(((q - p) * np.log(q / p)).sum())
