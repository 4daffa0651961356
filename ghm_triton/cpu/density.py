"""Step 2 in numpy: on a few dozen numbers a call of torch costs ten times what it computes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.reference.interface import RegionCounts

Floats = NDArray[np.float32]


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
    """As `density.update_density`, in its order, rounded to float32 where that is."""
    regions: NDArray[np.int64] = counts.regions.numpy()
    occupied, total = regions > 0, int(regions.sum())
    stored: Floats = smoothed.numpy()
    moved = np.float32(momentum) * stored
    moved += np.float32(1.0 - momentum) * regions.astype(np.float32)
    if ema == "mmdet":
        moved = density = np.where(occupied, moved, stored)
    else:
        density = moved / np.float32(1.0 - momentum ** (int(updates) + 1))
    several = int(occupied.sum()) if normalizer == "valid_bins" else regions.size
    # No entry, no density: whatever stands for it is not looked at.
    beta = np.float32(total) / np.where(occupied, density, np.float32(1.0))
    weights: Floats = (beta / np.float32(max(several, 1))) ** strength.numpy()
    if max_weight is not None:
        weights = np.minimum(weights, np.float32(max_weight))
    weights = np.where(occupied, weights, np.float32(0.0))
    clean = int(counts.invalid) == 0
    if persist and clean and total > 0:
        smoothed.copy_(torch.from_numpy(moved))
        updates += 1
    scale = factor / _parts(counts, total, divisor)
    if not clean:
        weights, scale = np.full_like(weights, np.nan), np.nan
    with np.errstate(over="ignore"):  # as torch: infinite, without a word
        return torch.from_numpy(weights), torch.from_numpy(np.asarray(scale, dtype=np.float32))


def _parts(counts: RegionCounts, total: int, divisor: str | None) -> float:
    if divisor is None:
        return 1.0
    return max(total if divisor == "valid" else float(counts.positives.numpy().sum()), 1.0)
