"""The weight of each unit region, and the scale of the sum, in one program.

Memory traffic: about 24 bytes per unit region and 8 per partial sum of positives (at most 8 KiB),
whatever the batch. Does not synchronise with the host.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops.launch import OPTIONS, define
from ghm_triton.reference.interface import DensityOptions, DensityState, RegionCounts


def update_density(
    counts: RegionCounts, state: DensityState, options: DensityOptions
) -> tuple[Tensor, Tensor]:
    """Compute what `ghm_triton.reference.update_density` documents."""
    weights, scale = torch.ops.ghm.update_density(*counts, *state, *options)
    return weights, scale


def launch_density(
    regions: Tensor,
    positives: Tensor,
    invalid: Tensor,
    smoothed: Tensor,
    updates: Tensor,
    strength: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel for `update_density`; `arguments` are those of `DensityOptions`."""
    options = DensityOptions(*arguments)
    momentum, bins, sums = options.momentum, smoothed.numel(), positives.numel()
    weights = torch.empty(bins, dtype=torch.float32, device=smoothed.device)
    scale = torch.empty((), dtype=torch.float32, device=smoothed.device)
    with torch.cuda.device_of(smoothed):
        density_kernel[(1,)](
            *(regions.contiguous(), positives, invalid, smoothed, updates, strength),
            *(weights, scale, sums, options.factor),
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins),
            BLOCK_SUMS=triton.next_power_of_2(sums),
            MOMENTUM=momentum,
            LOG_MOMENTUM=math.log(momentum) if momentum > 0 else -math.inf,
            DEBIASED=options.ema == "debiased",
            VALID_BINS=options.normalizer == "valid_bins",
            MAX_WEIGHT=options.max_weight,
            PERSIST=options.persist,
            DIVISOR=options.divisor,
            **OPTIONS,
        )
    return weights, scale


define(
    "update_density(Tensor regions, Tensor positives, Tensor invalid, Tensor(a!) smoothed,"
    " Tensor(b!) updates, Tensor strength, float momentum, str ema, str normalizer,"
    " float? max_weight, bool persist, str? divisor, float factor) -> (Tensor, Tensor)",
    launch_density,
    lambda _regions, _positives, _invalid, smoothed, *_: (
        torch.empty_like(smoothed),
        smoothed.new_empty(()),
    ),
)


# fmt: off
@triton.jit(do_not_specialize=["sums", "factor"])
def density_kernel(
    regions_ptr, positives_ptr, invalid_ptr, smoothed_ptr, updates_ptr, strength_ptr,
    weights_ptr, scale_ptr, sums, factor,
    BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, BLOCK_SUMS: tl.constexpr,
    MOMENTUM: tl.constexpr, LOG_MOMENTUM: tl.constexpr, DEBIASED: tl.constexpr,
    VALID_BINS: tl.constexpr, MAX_WEIGHT: tl.constexpr, PERSIST: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    """The arithmetic of the reference, in the same order."""
    region = tl.arange(0, BLOCK_BINS)
    exists = region < BINS
    counts = tl.load(regions_ptr + region, mask=exists, other=0)
    smoothed = tl.load(smoothed_ptr + region, mask=exists, other=0.0)
    updates = tl.load(updates_ptr)
    strength = tl.load(strength_ptr)
    sane = tl.load(invalid_ptr) == 0
    occupied = counts > 0
    total = tl.sum(counts, axis=0)

    # Divisions are rounded to nearest, as in torch: powers of two stay exact.
    each = tl.zeros([BLOCK_BINS], tl.float32)
    moved = MOMENTUM * smoothed + (1.0 - MOMENTUM) * counts.to(tl.float32)
    if DEBIASED:
        # In float64, as 1 - a^t cancels when a is close to 1.
        share = 1.0 - tl.exp((updates + 1).to(tl.float64) * LOG_MOMENTUM)
        density = tl.div_rn(moved, each + share.to(tl.float32))
    else:
        moved = tl.where(occupied, moved, smoothed)
        density = moved
    regions = tl.sum((occupied if VALID_BINS else exists).to(tl.int32), axis=0)
    beta = tl.div_rn(each + total.to(tl.float32), tl.where(occupied, density, 1.0))
    beta = tl.div_rn(beta, each + tl.maximum(regions, 1).to(tl.float32))

    # beta ** strength; the ends are exact: 1 is the paper, 0 is plain cross entropy.
    weights = tl.exp(strength * tl.log(tl.where(occupied, beta, 1.0)))
    weights = tl.where(strength == 1.0, beta, weights)
    if MAX_WEIGHT is not None:
        weights = tl.minimum(weights, MAX_WEIGHT)
    weights = tl.where(occupied, weights, 0.0)
    tl.store(weights_ptr + region, tl.where(sane, weights, float("nan")), mask=exists)

    scale = tl.full((), factor, tl.float64)
    if DIVISOR == "valid":
        scale = scale / tl.maximum(total, 1).to(tl.float64)
    if DIVISOR == "positives":
        part = tl.arange(0, BLOCK_SUMS)
        positives = tl.sum(tl.load(positives_ptr + part, mask=part < sums, other=0.0), axis=0)
        scale = scale / tl.maximum(positives, 1.0)
    tl.store(scale_ptr, tl.where(sane, scale.to(tl.float32), float("nan")))

    if PERSIST:
        keep = sane & (total > 0)
        tl.store(smoothed_ptr + region, tl.where(keep, moved, smoothed), mask=exists)
        tl.store(updates_ptr, updates + keep.to(tl.int64))
# fmt: on
