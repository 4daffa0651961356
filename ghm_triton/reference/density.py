"""From counts, or from the norms of every entry, to harmonizing weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ghm_triton.reference.interface import (
    ClassificationInputs,
    DensityOptions,
    DensityState,
    RegionCounts,
    RegressionInputs,
)
from ghm_triton.reference.losses import difference, gradient_norm, hypotenuse, valid_entries

MOST_REGIONS = 1024  # the limit of the kernels

Inputs = TypeVar("Inputs", ClassificationInputs, RegressionInputs)


def update_density(
    counts: RegionCounts, state: DensityState, options: DensityOptions, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the weights of the unit regions and the scale of the sum; update the average.

    With `S` the moving average of the counts, `N` the valid entries of this batch and `n` the
    regions counted by `normalizer`: `beta_j = N / (S_j * n)`, weight `beta_j ** strength`. For a
    sliding window `beta_j = N / GD_j`, with `GD_j` the `stream_density` of the moving average.

    Args:
        counts: The batch, summed over ranks.
        state: Changed in place when `options.persist`.
        options: Of the average, the weights and the scale.
        window: `M`, the inverse of the width of a sliding window over the regions, which are then
            `fine_regions(M)`; None: each unit region has the density of its own count.

    Returns:
        The weights, float32 `[M]`, 0 in empty regions, and the scale of the sum, float32 scalar.
        Both NaN when an entry was invalid: a rank without entries then has a NaN loss as well.
    """
    occupied = counts.regions > 0
    total = counts.regions.sum()
    density, moved = _average(counts.regions, state, options)
    if window is not None:
        density = stream_density(density, window)
    # Empty regions hold no entry: any finite density is valid for them.
    beta = total / torch.where(occupied, density, 1.0)
    if window is None:
        beta = beta / (occupied.sum() if options.normalizer == "valid_bins" else len(occupied))
    weights = _weights(beta, occupied, state.strength, options.max_weight)
    clean = counts.invalid == 0
    if options.persist:
        sound = clean & (total > 0)
        state.smoothed.copy_(torch.where(sound, moved, state.smoothed))
        state.updates.add_(sound)
    scale = _scale(counts.positives.sum(), total, options.divisor, options.factor)
    return torch.where(clean, weights, float("nan")), torch.where(clean, scale, float("nan"))


def fine_regions(bins: int) -> int:
    """How many fine regions stand for a window of width `1 / bins`: `F = bins * K`.

    `K` is the largest odd number with `bins * K` at most 1024, what the kernels can count at once:
    33 for 30 bins, 101 for 10. Odd, so that a window about the centre of a fine region begins and
    ends where fine regions do.

    Raises:
        ValueError: `bins` is above 341, so that a window would be less than three fine regions.
    """
    if bins > MOST_REGIONS // 3:
        raise ValueError(
            f"density='streaming' splits each of at most {MOST_REGIONS // 3} bins into three or"
            f" more, got bins={bins}"
        )
    split = MOST_REGIONS // bins
    return bins * (split - 1 + split % 2)


def stream_density(counts: Tensor, bins: int) -> Tensor:
    r"""The density of a sliding window about the centre of each fine region.

    A window of width `1 / bins` about the centre `c` of a fine region holds `K = F / bins` whole
    regions, fewer at the ends of [0, 1]. Their counts by the window's valid length `l(c)` are the
    density given to every entry `g` of that region. It departs from the exact density of the same
    entries by at most

    .. math:: |GD_{streaming}(g) - GD(g)| \le \frac{E + \lambda \, GD_{streaming}(g)}{l(g)}

    where `E` is the largest count among the four fine regions that touch the two ends of the
    window (what lies outside [0, 1] counts 0), and `lambda = 1 / (2 F)` where the window about
    `c` or about `g` reaches over an end of [0, 1], else 0. For `g` is within `1 / (2 F)` of `c`,
    so moving the window from `c` to `g` takes in entries of one region at one end and gives up
    entries of one region at the other, which changes the count by at most the larger number; and
    it changes `l` by no more than the distance, and only where an end cuts it. Where norms lie
    evenly the first part is `1 / K` of the density, and the second is never more, as
    `l(g) >= 1 / (2 bins)`.

    Args:
        counts: `[F]`, not negative, floating; `F` an odd multiple of `bins`.
        bins: `M`.

    Returns:
        Entries per unit of gradient norm, `[F]`, the dtype of `counts`.
    """
    fine = len(counts)
    half = (fine // bins - 1) // 2
    # Each window is summed for itself: differences of prefix sums would cancel where a sparse
    # window follows a full region, and torch's cumsum of floats is not deterministic on a GPU.
    windows = torch.nn.functional.pad(counts, (half, half)).unfold(0, 2 * half + 1, 1)
    centre = torch.arange(fine, device=counts.device, dtype=counts.dtype) + 0.5
    # In fine regions, where every length is a whole number and float32 holds it.
    length = centre.clamp(max=half + 0.5) + (fine - centre).clamp(max=half + 0.5)
    return windows.sum(1) * (fine / length)


def _average(
    regions: Tensor, state: DensityState, options: DensityOptions
) -> tuple[Tensor, Tensor]:
    """The average of the counts with this batch, as used and as stored."""
    a, stored = options.momentum, state.smoothed
    moved = a * stored + (1.0 - a) * regions.to(torch.float32)
    if options.ema == "mmdet":
        moved = torch.where(regions > 0, moved, stored)
        return moved, moved
    return moved / (1.0 - a ** (state.updates + 1).double()).to(torch.float32), moved


def _weights(beta: Tensor, occupied: Tensor, strength: Tensor, max_weight: float | None) -> Tensor:
    weights = beta.to(torch.float32) ** strength
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    return torch.where(occupied, weights, 0.0)


def _scale(positives: Tensor, total: Tensor, divisor: str | None, factor: float) -> Tensor:
    if divisor is None:
        return torch.full_like(positives, factor, dtype=torch.float32)
    by = total.double() if divisor == "valid" else positives
    return (factor / by.clamp(min=1)).float()


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


def weigh_entries(
    inputs: Inputs, bins: int, strength: Tensor, max_weight: float | None, *, weighted: bool
) -> Inputs:
    """The same inputs with a harmonizing weight of each entry for `label_weight`.

    Args:
        inputs: Predictions and targets.
        bins: `M`.
        strength: float32 scalar in [0, 1].
        max_weight: Upper bound of a weight, or None.
        weighted: Whether the user's `label_weight` multiplies, or only selects.

    Returns:
        Inputs to hand to `weighted_bce` or `weighted_asl1` with `weighted=True` and a table of
        ones.
    """
    if isinstance(inputs, RegressionInputs):
        d = difference(inputs).detach()
        norm = d.abs() / hypotenuse(d, inputs.mu)
        valid = torch.ones_like(d, dtype=torch.bool) if inputs.weight is None else inputs.weight > 0
    else:
        norm, valid = gradient_norm(inputs), valid_entries(inputs)
    beta = valid.sum() / window_density(norm, bins, valid)
    weights = _weights(beta, valid, strength, max_weight)
    # A weight also selects, by being positive. An invalid entry has no density, and must stay
    # selected: its loss is NaN, not 0.
    weights = torch.where(weights > 0, weights, 1.0)
    if weighted and inputs.weight is not None:
        weights = weights * inputs.weight.to(weights.dtype)
    return replace(inputs, weight=torch.where(valid, weights, 0.0))
