"""Reformulated gradients of the losses, from a measured histogram of gradient norms.

All quantities concern the logit's gradient of one entry (an anchor and a class) whose cross
entropy has the gradient norm `g = |p - p*|`. The harmonized gradient is no function of `g` alone:
it depends on how many entries share a norm, hence the histogram.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
ALPHA, GAMMA = 0.25, 2.0  # of focal loss
SIDES = ("positives", "negatives")


class Histogram(NamedTuple):
    """Entries by gradient norm, float64 `[bins]` each, over equal regions of [0, 1].

    Attributes:
        positives: Counts of positives.
        negatives: Counts of negatives.
        gradients: Measured sums of the logits' gradients by loss (`ce`, `focal`), or None.
    """

    positives: Array
    negatives: Array
    gradients: dict[str, Array] | None = None

    @property
    def total(self) -> Array:
        """Counts of all entries."""
        return self.positives + self.negatives

    @property
    def centres(self) -> Array:
        """Centres of the regions."""
        return (np.arange(len(self.positives)) + 0.5) / len(self.positives)

    @property
    def edges(self) -> Array:
        """Edges of the regions, `[bins + 1]`."""
        return np.linspace(0.0, 1.0, len(self.positives) + 1)


def histogram_of(runs: Iterable[Mapping[str, Any]]) -> Histogram | None:
    """Average the `gradient_norms` of several runs; None where all are empty."""
    recorded = [norms for norms in runs if norms]
    if not recorded:
        return None
    sides = (np.mean([norms[side] for norms in recorded], 0) for side in SIDES)
    sums = [norms["gradients"] for norms in recorded if norms.get("gradients")]
    complete = len(sums) == len(recorded)
    means = {
        loss: np.mean([each[loss] for each in sums], 0) for loss in ("ce", "focal") if complete
    }
    return Histogram(*sides, means or None)


def focal_positive(norm: Array) -> Array:
    """Gradient norm of focal loss for a positive with `p = 1 - g`.

    `alpha (1 - p)^gamma (1 - p - gamma p log p)`, the derivative of equation 5 of arXiv
    1708.02002 with alpha 0.25 and gamma 2.
    """
    probability = 1 - norm
    # p log p is 0 at p = 0.
    entropy = probability * np.log(np.maximum(probability, np.finfo(np.float64).tiny))
    return ALPHA * norm**GAMMA * (norm - GAMMA * entropy)


def focal_negative(norm: Array) -> Array:
    """Gradient norm of focal loss for a negative with `p = g`: `focal_positive` mirrored."""
    return (1 - ALPHA) / ALPHA * focal_positive(norm)


def harmonizing_weights(histogram: Histogram, strength: float) -> Array:
    """Weight of GHM-C by region, `(N / (R_j n)) ** strength`; NaN for regions without entries.

    Equation 9 of arXiv 1811.05181 with `n` the occupied regions, as the released code has it.
    """
    counts = histogram.total
    occupied = counts > 0
    with np.errstate(divide="ignore"):
        betas = counts.sum() / (counts * occupied.sum())
    # Take the power before masking: NaN ** 0 is 1.
    return np.where(occupied, betas**strength, np.nan)


def contributions(histogram: Histogram, strengths: Iterable[float]) -> dict[str, Array]:
    """Share of every region in the sum of all gradients, by loss.

    Where the histogram has no gradients, entries are taken to lie in the middle of their region,
    which overestimates the first: most of its entries are close to 0.

    Args:
        histogram: Histogram of a detector.
        strengths: Strengths of GHM-C.

    Returns:
        Float64 `[bins]` with sum 1, NaN for regions without entries, for `CE`, `focal` and
        `GHM <strength>`.
    """
    norm, counts = histogram.centres, histogram.total
    focal = histogram.positives * focal_positive(norm) + histogram.negatives * focal_negative(norm)
    sums = histogram.gradients or {"ce": counts * norm, "focal": focal}
    totals = {"CE": sums["ce"], "focal": sums["focal"]}
    for strength in strengths:
        totals[f"GHM {strength:g}"] = sums["ce"] * harmonizing_weights(histogram, strength)
    return {
        name: np.where(counts == 0, np.nan, total / np.nansum(total))
        for name, total in totals.items()
    }
