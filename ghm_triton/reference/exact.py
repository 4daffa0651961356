"""The paper's sliding window: the density of every entry, and one weight per entry.

Plain torch on every device, without synchronising with the host. Takes about 30
bytes of memory per entry: the norms, their order and the counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.binning import difference, gradient_norm, hypotenuse, valid_entries
from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs

MOST_ENTRIES = 2**31 - 1  # the limit of a sort in torch on a GPU


def window_density(norm: Tensor, bins: int, valid: Tensor | None = None) -> Tensor:
    r"""The density of every entry among the valid ones, in `O(N log N)`.

    .. math:: GD(g) = \frac{1}{l(g)} \#\{k : g - \epsilon/2 \le g_k < g + \epsilon/2\}, \quad
              l(g) = \min(g + \epsilon/2, 1) - \max(g - \epsilon/2, 0), \quad \epsilon = 1 / M

    The definition in arXiv 1811.05181. An entry counts itself, so the density of a valid entry
    is at least `1 / epsilon`. The window is half open: of two entries that are `epsilon / 2` apart
    the larger counts the smaller one and not the other way round. Norms and edges are rounded to
    the dtype of `norm`, so an entry within a step of an edge (in float32 6e-8 below 1) may be
    counted on its other side; edges that the dtype holds, as where `M` and the norms are powers of
    two, part entries exactly.

    Args:
        norm: `g` in [0, 1], any shape, float32 or float64.
        bins: `M`.
        valid: bool, the shape of `norm`: the valid entries; None: all.

    Returns:
        Entries per unit of gradient norm, the shape and dtype of `norm`. Undefined for other
        entries, and for a norm that is NaN or out of range.

    Raises:
        ValueError: There are more than 2^31 - 1 entries.
    """
    if norm.numel() > MOST_ENTRIES:
        raise ValueError(
            f"density='exact' sorts at most {MOST_ENTRIES} entries at once, got {norm.numel()};"
            " density='streaming' has no such limit"
        )
    half = 0.5 / bins
    # Ignored entries sort to the end, beyond every window, so that shapes stay static.
    kept = norm if valid is None else torch.where(valid, norm, float("inf"))
    ascending, order = torch.sort(kept.flatten())
    # Sorted queries stay in the cache: 2.5x as fast as unsorted ones.
    below = torch.searchsorted(ascending, ascending - half, out_int32=True)
    inside = torch.searchsorted(ascending, ascending + half, out_int32=True) - below
    # The same length as min(g + half, 1) - max(g - half, 0), without its cancellation.
    length = ascending.clamp(max=half) + (1.0 - ascending).clamp(max=half)
    density = inside / length
    return torch.empty_like(density).scatter_(0, order, density).view(norm.shape)


def weigh_bce(
    inputs: ClassificationInputs,
    bins: int,
    strength: Tensor,
    max_weight: float | None,
    *,
    weighted: bool,
) -> ClassificationInputs:
    """The same inputs with harmonizing weights for `label_weight`.

    Args:
        inputs: Logits and targets.
        bins: `M`.
        strength: float32 scalar in [0, 1].
        max_weight: Upper bound of a weight, or None.
        weighted: Whether the user's `label_weight` multiplies, or only selects.

    Returns:
        Inputs to hand to `weighted_bce` with `weighted=True` and a table of ones.
    """
    norm, valid = gradient_norm(inputs), valid_entries(inputs)
    weight = _weights(norm, valid, bins, strength, max_weight, inputs.weight if weighted else None)
    return ClassificationInputs(inputs.logits, inputs.index, inputs.target, weight, inputs.shape)


def weigh_asl1(
    inputs: RegressionInputs,
    bins: int,
    strength: Tensor,
    max_weight: float | None,
    *,
    mu: float,
    weighted: bool,
) -> RegressionInputs:
    """As `weigh_bce`, for `weighted_asl1`; `mu` is the width of the quadratic part."""
    d = difference(inputs).detach()
    norm = d.abs() / hypotenuse(d, mu)
    valid = torch.ones_like(d, dtype=torch.bool) if inputs.weight is None else inputs.weight > 0
    weight = _weights(norm, valid, bins, strength, max_weight, inputs.weight if weighted else None)
    return RegressionInputs(inputs.pred, inputs.target, weight, inputs.shape)


def _weights(
    norm: Tensor,
    valid: Tensor,
    bins: int,
    strength: Tensor,
    max_weight: float | None,
    multiplier: Tensor | None,
) -> Tensor:
    beta = (valid.sum() / window_density(norm, bins, valid)).float()
    weights = beta**strength
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    # A weight also selects, by being positive. An invalid entry has no density, and must stay
    # selected: its loss is NaN, not 0.
    weights = torch.where(weights > 0, weights, 1.0)
    if multiplier is not None:
        weights = weights * multiplier.to(weights.dtype)
    return torch.where(valid, weights, 0.0)
