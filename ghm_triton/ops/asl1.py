"""GHM-R: gradient norms of authentic smooth L1 by unit region, then the weighted loss.

Memory traffic in bytes per element, with `b` and `t` those of a prediction and of a target:
counting reads `b + t`; loss and gradient together read the same and write `b`; a training step
moves `3 b + 2 t`. `label_weight` and a gradient pass of its own as in `bce.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops import launch
from ghm_triton.ops.device import (
    add_counts,
    asl1,
    first_tile,
    load_difference,
    next_tile,
    previous_tile,
    unit_region,
    write_results,
)
from ghm_triton.reference.interface import RegionCounts, RegressionInputs


# fmt: off
@triton.jit(do_not_specialize=["rows", "tiles"])
def count_asl1_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    MU: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of entries per program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    harm = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tile_r, tile_c = first_tile(tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        d, _, valid = load_difference(
            pred_ptr, target_ptr, weight_ptr,
            pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        _, slope = asl1(d, MU)
        region = tl.where(valid, unit_region(tl.abs(slope), BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        harm = tl.fma(d, 0.0, harm)  # NaN once a difference is not finite
        tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    harm = tl.sum(tl.ravel(harm), axis=0)
    add_counts(counts_ptr, histogram, harm != harm, BINS, BLOCK_BINS)
    # Every valid entry belongs to a positive sample.
    counted = tl.where(tl.arange(0, BLOCK_BINS) < BINS, histogram, 0)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(counted, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "tiles"])
def asl1_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, MU: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; see `write_results` for LOSS.

    The gradient is `outer * scale * table[region] * d / sqrt(d^2 + mu^2)`.
    """
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    scale = tl.load(scale_ptr)
    tile_r, tile_c = first_tile(tiles - 1 - tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        d, weight, valid = load_difference(
            pred_ptr, target_ptr, weight_ptr,
            pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        entry, slope = asl1(d, MU)
        region = unit_region(tl.abs(slope), BINS)
        factor = tl.load(table_ptr + region, mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        total = write_results(
            total, factor, entry, slope, scale, outer_ptr, outer_row, outer_col,
            loss_ptr, gradient_ptr, gradient_row, gradient_col, tile_r, tile_c, rows, cols,
            LOSS, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        tile_r, tile_c = previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on


WEIGHTED_ASL1 = launch.LossOperator(
    *("weighted_asl1", asl1_kernel, "float mu, bool weighted"),
    constants=lambda _, factors, mu, weighted: {
        "MU": mu,
        "WEIGHTED": weighted,
        "BINS": factors[0].numel(),
    },
)


def count_asl1(inputs: RegressionInputs, bins: int) -> RegionCounts:
    """Count `|d| / sqrt(d^2 + mu^2)` by unit region, in one pass over the inputs."""
    counts = torch.ops.ghm.count_asl1(inputs.pred, inputs.target, inputs.weight, bins, inputs.mu)
    return launch.region_counts(counts, bins)


def weighted_asl1(
    inputs: RegressionInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """Weighted authentic smooth L1; the gradient has the dtype and layout of the predictions."""
    data = (inputs.pred, inputs.target, inputs.weight)
    return WEIGHTED_ASL1.apply(*data, table, scale, inputs.mu, weighted, reduce=reduce)


def launch_count(
    pred: Tensor, target: Tensor, weight: Tensor | None, bins: int, mu: float
) -> Tensor:
    """See `launch.count`."""
    return launch.count(count_asl1_kernel, pred, target, weight, bins, MU=mu)


launch.define_count("count_asl1", launch_count, "int bins, float mu")
