"""What losses make of a gradient: the papers' curves, from a measured histogram of norms.

Everything is about the logit's gradient of one entry (an anchor and a class) whose cross entropy
has the gradient norm `g = |p - p*|`. Harmonizing has no formula of `g` alone: it depends on how
many entries share a norm, so it takes a histogram. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.report.runs import Run

Array = NDArray[np.float64]
ALPHA, GAMMA = 0.25, 2.0  # of focal loss


class Histogram(NamedTuple):
    """Entries by gradient norm, float64 `[bins]` each, over equal regions of [0, 1].

    Attributes:
        positives: How many.
        negatives: How many.
        gradients: Sums of the logits' gradients by loss (`ce`, `focal`), as measured; None where
            only counts are known.
    """

    positives: Array
    negatives: Array
    gradients: dict[str, Array] | None = None

    @property
    def total(self) -> Array:
        """Positives and negatives."""
        return self.positives + self.negatives

    @property
    def centres(self) -> Array:
        """Of the regions."""
        return (np.arange(len(self.positives)) + 0.5) / len(self.positives)

    @property
    def edges(self) -> Array:
        """Of the regions, one more than there are regions."""
        return np.linspace(0.0, 1.0, len(self.positives) + 1)


def histogram_of(runs: Iterable[Run]) -> Histogram | None:
    """Mean counts of runs' `gradient_norms`; None where no run has any.

    Raises:
        ValueError: Histograms are not of one length, or not of counts.
    """
    found = [run["gradient_norms"] for run in runs if run.get("gradient_norms")]
    if not found:
        return None
    positives, negatives = (_mean(found, name) for name in ("positives", "negatives"))
    if positives.shape != negatives.shape:
        raise ValueError(
            f"gradient_norms have {len(positives)} regions of positives"
            f" and {len(negatives)} of negatives"
        )
    measured = [each["gradients"] for each in found if each.get("gradients")]
    if len(measured) < len(found):
        return Histogram(positives, negatives)
    return Histogram(positives, negatives, {x: _mean(measured, x) for x in ("ce", "focal")})


def _mean(found: list[dict[str, Any]], name: str) -> Array:
    try:
        counts = np.array([each[name] for each in found], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"gradient_norms of one method do not fit together: {error!r}") from None
    if counts.ndim != 2 or counts.shape[1] == 0 or not (counts >= 0).all():
        raise ValueError(f"gradient_norms: {name!r} must be lists of counts")
    mean: Array = counts.mean(0)
    return mean


def focal_positive(norm: Array) -> Array:
    """Focal loss: the gradient's size for a positive with `p = 1 - g`.

    `alpha (1 - p)^gamma (1 - p - gamma p log p)`, the derivative of equation 5 of arXiv
    1708.02002 with alpha 0.25 and gamma 2.
    """
    probability = 1 - norm
    # p log p is 0 at p = 0.
    entropy = probability * np.log(np.maximum(probability, np.finfo(np.float64).tiny))
    return ALPHA * norm**GAMMA * (norm - GAMMA * entropy)


def focal_negative(norm: Array) -> Array:
    """Focal loss: the gradient's size for a negative with `p = g`; `focal_positive` mirrored."""
    return (1 - ALPHA) / ALPHA * focal_positive(norm)


def harmonizing_weights(histogram: Histogram, strength: float) -> Array:
    """GHM-C's weight by region, `(N / (R_j n)) ** strength`; NaN for regions without entries.

    Equation 9 of arXiv 1811.05181 with `n` the occupied regions, as the released code has it.
    """
    counts = histogram.total
    occupied = counts > 0
    with np.errstate(divide="ignore"):
        betas = counts.sum() / (counts * occupied.sum())
    # The power first: that of NaN is 1 at strength 0.
    return np.where(occupied, betas**strength, np.nan)


def contributions(histogram: Histogram, strengths: Iterable[float]) -> dict[str, Array]:
    """Every region's share of the sum of all gradients, by loss.

    Where the histogram has no gradients, entries count as being in the middle of their region. That
    says too much of the first: most of its entries are next to 0.

    Args:
        histogram: Of a detector.
        strengths: Of GHM-C.

    Returns:
        Float64 `[bins]` with sum 1, NaN for regions without entries, for `CE`, `focal` and
        `GHM <strength>`.
    """
    heard = histogram.gradients or _in_the_middle(histogram)
    totals = {"CE": heard["ce"], "focal": heard["focal"]}
    for strength in strengths:
        totals[f"GHM {strength:g}"] = heard["ce"] * harmonizing_weights(histogram, strength)
    empty = histogram.total == 0
    return {
        name: np.where(empty, np.nan, total / np.nansum(total)) for name, total in totals.items()
    }


def _in_the_middle(histogram: Histogram) -> dict[str, Array]:
    norm = histogram.centres
    focal = histogram.positives * focal_positive(norm)
    focal += histogram.negatives * focal_negative(norm)
    return {"ce": histogram.total * norm, "focal": focal}
