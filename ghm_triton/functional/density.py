"""The density itself, of any gradient norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton._inputs import require_bins, require_choice
from ghm_triton.density import DENSITIES, count_regions
from ghm_triton.functional.options import Density
from ghm_triton.reference.binning import compute_dtype, unit_region
from ghm_triton.reference.density import stream_density
from ghm_triton.reference.exact import window_density


def gradient_density(
    gradient_norm: Tensor, bins: int = 30, density: Density = "unit_region"
) -> Tensor:
    """The density of each entry among all: how many share its neighbourhood, by its width.

    Args:
        gradient_norm: `g` in [0, 1], any shape, floating.
        bins: `M`, 1 to 1024; up to 341 for `streaming`.
        density: `unit_region`: `R_ind(g) * M` (equation 8 of arXiv 1811.05181); `exact`: a window
            of width `1 / M` about the entry, as the paper defines it, `O(N log N)`; `streaming`:
            that window from fine regions, within the bound that `stream_density` states.

    Returns:
        float32 of the same shape: entries per unit of gradient norm.

    Raises:
        TypeError: The input is not floating.
        ValueError: A value lies outside [0, 1] or is NaN (looked at on the CPU only); or an option
            does not fit.

    Example:
        >>> gradient_density(torch.tensor([0.01, 0.02, 0.9]), bins=10)
        tensor([20., 20., 10.])
        >>> gradient_density(torch.tensor([0.01, 0.05, 0.9]), bins=10, density="exact")
        tensor([33.3333, 20.0000, 10.0000])
    """
    require_bins(bins)
    require_choice("density", density, DENSITIES)
    regions = count_regions(bins, density)
    if not gradient_norm.is_floating_point():
        raise TypeError(f"gradient_norm must be floating, got {gradient_norm.dtype}")
    if gradient_norm.device.type == "cpu" and gradient_norm.numel():
        low, high = (float(bound) for bound in torch.aminmax(gradient_norm))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"gradient_norm must lie in [0, 1]; got {low:g} to {high:g}")
    norm = gradient_norm.detach().to(compute_dtype(gradient_norm))
    if density == "exact":
        return window_density(norm, bins).float()
    region = unit_region(norm, regions).flatten()
    counts = torch.zeros(regions, dtype=torch.int64, device=region.device)
    counts.scatter_add_(0, region, torch.ones_like(region))
    table = counts * bins if density == "unit_region" else stream_density(counts.double(), bins)
    return table[region].float().view(gradient_norm.shape)
