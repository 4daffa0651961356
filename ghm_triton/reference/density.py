"""Step 2: from counts to one harmonizing weight a unit region."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.binning import RegionCounts


def update_density(
    counts: RegionCounts,
    smoothed: Tensor,
    updates: Tensor,
    strength: Tensor,
    *,
    momentum: float,
    ema: str,
    normalizer: str,
    max_weight: float | None,
    persist: bool,
    divisor: str | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Weigh every unit region, move the average on, and find what multiplies the sum.

    With `S` the moving average of the counts, `N` the valid entries of this batch and `n` the
    regions counted by `normalizer`: `beta_j = N / (S_j * n)`, weight `beta_j ** strength`.

    Args:
        counts: The batch, summed over ranks.
        smoothed: float32 `[M]`, `S` as stored; changed in place when `persist`.
        updates: int64 scalar, the updates so far; changed in place when `persist`.
        strength: float32 scalar in [0, 1].
        momentum: `a` in [0, 1): `S <- a S + (1 - a) R`.
        ema: `debiased`: divide by `1 - a^t`, empty regions decay. `mmdet`: no correction, empty
            regions keep their value.
        normalizer: `valid_bins`: `n` is the number of regions occupied in this batch; `bins`: `M`.
        max_weight: Upper bound of a weight, or None.
        persist: Whether to store the new average. A batch without valid entries, or with an
            invalid one, is never stored.
        divisor: What the sum is divided by, at least 1: the number of `valid` entries, the sum of
            the `positives`, or None.
        factor: What the sum is multiplied by.

    Returns:
        The weights, float32 `[M]`, 0 in empty regions, and the scale of the sum, float32 scalar.
        Both NaN when an entry was invalid: then a rank without entries of its own has a NaN loss
        as well.
    """
    current = counts.regions.to(torch.float32)
    occupied = counts.regions > 0
    total = counts.regions.sum()
    moved = momentum * smoothed + (1.0 - momentum) * current
    if ema == "mmdet":
        moved = torch.where(occupied, moved, smoothed)
        density = moved
    else:
        density = moved / (1.0 - momentum ** (updates + 1).double()).to(torch.float32)
    regions = occupied.sum() if normalizer == "valid_bins" else len(current)
    # Empty regions hold no entry: any finite density will do for them.
    beta = total / torch.where(occupied, density, 1.0) / regions
    weights = beta.to(torch.float32) ** strength
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    weights = torch.where(occupied, weights, 0.0)
    if persist:
        sound = (counts.invalid == 0) & (total > 0)
        smoothed.copy_(torch.where(sound, moved, smoothed))
        updates.add_(sound)
    scale = _scale(counts.positives.sum(), total, divisor, factor)
    clean = counts.invalid == 0
    return torch.where(clean, weights, float("nan")), torch.where(clean, scale, float("nan"))


def _scale(positives: Tensor, total: Tensor, divisor: str | None, factor: float) -> Tensor:
    if divisor is None:
        return torch.full_like(positives, factor, dtype=torch.float32)
    by = total.double() if divisor == "valid" else positives
    return (factor / by.clamp(min=1)).float()
