"""Softmax GHM: gradient norms `1 - p_y` by unit region, then the weighted cross entropy.

An entry is a row, and a row lies in one tile, so there are at most `MAX_CLASSES` columns.

Memory traffic in bytes per element, with `b` those of a logit: counting reads `b + 8 / C`; loss and
gradient together read the same and write `b`; a training step moves `3 b`. The logit of a row's own
class is read twice, the second time from the cache. A gradient pass of its own as in `bce.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops import launch
from ghm_triton.ops.device import (
    LOG2_E,
    add_counts,
    at,
    entries,
    load_labels,
    load_outer,
    load_weight,
    log1p,
    reciprocal,
    store_tile,
    unit_region,
)
from ghm_triton.ops.launch import WARPS, Tiling, most_programs
from ghm_triton.reference.interface import RegionCounts, SoftmaxInputs
from ghm_triton.reference.losses import MAX_CLASSES

LN_2 = tl.constexpr(0.6931471805599453)
STEP = tl.constexpr(2.0**-30)
LANES = 32  # of a warp, the fewest on any device
EACH = 32  # entries of a tile per thread: with so few warps, enough to hide memory latency


def row_tiling(logits: Tensor) -> Tiling:
    """Tiles of whole rows; where they fit into one warp, few lanes share a row."""
    rows, cols = logits.shape
    block_c = max(2, triton.next_power_of_2(cols))
    warps = 1 if block_c <= EACH * LANES else WARPS
    block_r = max(1, EACH * LANES * warps // block_c)
    tiles = triton.cdiv(rows, block_r)
    most = most_programs(logits.device) * WARPS // warps
    programs = max(1, min(tiles, most, launch.MAX_PROGRAMS))
    return Tiling(tiles, block_r, block_c, programs, warps)


# fmt: off
@triton.jit
def load_rows(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load logits (0 where ignored or past the end), those of the rows' classes, and the rest.

    That is class indices, weights, validity and harm, all `[BLOCK_R, 1]` like the logits of the
    classes; `harm` is NaN where a valid row's index is not a class.
    """
    first = tl.zeros([], tl.int32)
    exists = entries(tile_r, first, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    logits = at(logits_ptr, tile_r, first, logits_row, logits_col, ALIGN, BLOCK_R, BLOCK_C)
    x = tl.load(logits, mask=exists, other=0.0).to(tl.float32)
    label = load_labels(target_ptr, target_row, tile_r, rows, cols, BLOCK_R)
    weight, valid = load_weight(
        weight_ptr, weight_row, 0, tile_r, first, label >= 0, 1, BLOCK_R, 1
    )
    # Read again, from the first-level cache: cheaper than a search among the row's lanes.
    chosen = at(logits_ptr, tile_r, first, logits_row, 0, ALIGN, BLOCK_R, 1)
    chosen += label.to(tl.int64) * logits_col
    logit = tl.load(chosen, mask=valid & (label < cols), other=0.0).to(tl.float32)
    harm = tl.where(valid & (label >= cols), float("nan"), 0.0)
    return tl.where(valid, x, 0.0), logit, label, weight, valid, harm


@triton.jit
def exponentials(x, logit, cols, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Compute `exp(x - peak)`, 0 past the last class; that of the row's class; `peak`."""
    if not WHOLE:
        x = tl.where(tl.arange(0, BLOCK_C)[None, :] < cols, x, float("-inf"))
    peak = tl.max(x, axis=1)[:, None]
    return tl.exp2((x - peak) * LOG2_E), tl.exp2((logit - peak) * LOG2_E), peak


@triton.jit
def row_region(e, mine, BINS: tl.constexpr):
    """Find the region of `1 - p_y`, the same one when counting and when weighing.

    A sum of floats across lanes depends on their order, which differs between kernels. So integers
    are added, in steps of 2^-30.
    """
    total = tl.sum(in_steps(e), axis=1)[:, None]
    others = (total - in_steps(mine)).to(tl.float32) * STEP
    return unit_region(others * reciprocal(total.to(tl.float32) * STEP), BINS)


@triton.jit
def in_steps(e):
    """Round an exponential down to whole `STEP`s; the sum of a row needs more than 32 bits."""
    return (e * (1.0 / STEP)).to(tl.int32).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_softmax_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, FILL: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of rows per program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    harmed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_r = tl.full([], tile, tl.int32)
        x, logit, _, _, valid, harm = load_rows(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
            WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        e, mine, _ = exponentials(x, logit, cols, WHOLE, BLOCK_C)
        # Each row once; the other entries fill a histogram of few rows up to a whole warp.
        counted = valid & (tl.arange(0, FILL)[None, :] == 0)
        region = tl.where(counted, row_region(e, mine, BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        harmed = tl.fma(x, 0.0, harmed + harm)  # NaN once a logit is not finite
    harm = tl.sum(tl.ravel(harmed), axis=0)
    add_counts(counts_ptr, histogram, harm != harm, BINS, BLOCK_BINS)
    rows_counted = tl.where(tl.arange(0, BLOCK_BINS) < BINS, histogram, 0)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(rows_counted, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "tiles"])
def softmax_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; see `write_results` for LOSS.

    The gradient is `outer * scale * table[region] * (softmax - onehot)`.
    """
    total = tl.zeros([BLOCK_R, 1], tl.float32)
    scale = tl.load(scale_ptr)
    first = tl.zeros([], tl.int32)
    for step in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_r = tl.full([], tiles - 1 - step, tl.int32)
        x, logit, label, weight, valid, _ = load_rows(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
            WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        e, mine, peak = exponentials(x, logit, cols, WHOLE, BLOCK_C)
        is_label = label == tl.arange(0, BLOCK_C)[None, :]
        # Not 1 - p_y, which cancels when p_y is close to 1.
        others = tl.sum(tl.where(is_label, 0.0, e), axis=1)[:, None]
        factor = tl.load(table_ptr + row_region(e, mine, BINS), mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        if LOSS is not None:
            # log(1 + others / mine): as a series where that is small, so that it keeps its digits.
            mild = others <= mine
            steep = (peak - logit) + LN_2 * tl.log2(mine + others)
            loss = tl.where(mild, log1p(tl.where(mild, others / mine, 0.0)), steep)
            if LOSS == "sum":
                total = tl.fma(factor, loss, total)
            else:
                store_tile(
                    loss_ptr, 1, 1, factor * loss * scale,
                    tile_r, first, rows, cols, True, 1, BLOCK_R, 1,
                )
        if gradient_ptr is not None:
            outer = load_outer(
                outer_ptr, outer_row, 0, scale, tile_r, first, rows, cols, True, BLOCK_R, 1,
            )
            inverse = reciprocal(mine + others)
            slope = tl.where(is_label, -others, e) * inverse
            store_tile(
                gradient_ptr, gradient_row, gradient_col, (outer * factor) * slope,
                tile_r, first, rows, cols, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
            )
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on


WEIGHTED_SOFTMAX = launch.LossOperator(
    *("weighted_softmax", softmax_kernel, "bool weighted"),
    constants=lambda _, factors, weighted: {"WEIGHTED": weighted, "BINS": factors[0].numel()},
    cut=row_tiling,
    rows=True,
)


def count_softmax(inputs: SoftmaxInputs, bins: int) -> RegionCounts:
    """Count `1 - p_y` by unit region, in one pass over the inputs.

    Raises:
        ValueError: There are more than `MAX_CLASSES` classes.
    """
    classes = inputs.logits.shape[1]
    if classes > MAX_CLASSES:
        raise ValueError(
            f"backend='triton' takes up to {MAX_CLASSES} classes, got {classes};"
            " use backend='torch'"
        )
    counts = torch.ops.ghm.count_softmax(inputs.logits, inputs.index, inputs.weight, bins)
    return launch.region_counts(counts, bins)


def weighted_softmax(
    inputs: SoftmaxInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """Weighted softmax cross entropy; the gradient has the dtype and layout of the logits."""
    data = (inputs.logits, inputs.index, inputs.weight)
    return WEIGHTED_SOFTMAX.apply(*data, table, scale, weighted, reduce=reduce)


def launch_count(logits: Tensor, index: Tensor, weight: Tensor | None, bins: int) -> Tensor:
    """See `launch.count`."""
    cut = row_tiling(logits)
    fill = max(1, LANES * cut.warps // cut.block_r)
    return launch.count(count_softmax_kernel, logits, index, weight, bins, cut, FILL=fill)


launch.define_count("count_softmax", launch_count)
