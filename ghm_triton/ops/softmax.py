"""Softmax GHM: counting by `g = 1 - p_y`, then cross entropy by unit region and its gradient.

An extension: neither the paper nor the released code has it. One entry a row; a row lies in one
tile, so there are up to `reference.softmax.MAX_CLASSES` columns.

Memory traffic, bytes an element, with `b` those of a logit: counting reads `b + 8 / C`; loss and
gradient together read the same and write `b`: `3 b` a training step. The logit of a row's own class
is read twice, the second time from the cache. Without reduction, and in float16, the gradient has a
pass of its own, as in `bce.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops import tiles as shared
from ghm_triton.ops.arithmetic import LOG2_E, log1p, reciprocal, unit_region
from ghm_triton.ops.binning import add_counts, scratch
from ghm_triton.ops.loads import (
    arguments,
    load_labels,
    load_outer,
    load_weight,
    outer_strides,
    store_tile,
)
from ghm_triton.ops.scaling import sum_partials
from ghm_triton.ops.tiles import OPTIONS, Tiling, alignment, at, entries, most_programs, strides

LN_2 = tl.constexpr(0.6931471805599453)
STEP = tl.constexpr(2.0**-30)
LANES = 32  # of a warp, the fewest there are
EACH = 32  # entries of a tile a thread: with so few warps, what hides the way to memory


def row_tiling(logits: Tensor) -> tuple[Tiling, dict[str, int | bool]]:
    """Tiles of whole rows, and the options of a launch: one warp, so that few lanes share a row."""
    rows, cols = logits.shape
    block_c = max(2, triton.next_power_of_2(cols))
    warps = 1 if block_c <= EACH * LANES else OPTIONS["num_warps"]
    block_r = max(1, EACH * LANES * warps // block_c)
    tiles = triton.cdiv(rows, block_r)
    most = most_programs(logits.device) * OPTIONS["num_warps"] // warps
    programs = max(1, min(tiles, most, shared.MAX_PROGRAMS))
    return Tiling(tiles, block_r, block_c, programs), {**OPTIONS, "num_warps": warps}


def count_softmax(logits: Tensor, index: Tensor, weight: Tensor | None, bins: int) -> Tensor:
    """Count `1 - p_y` of the valid rows; the result is laid out as that of `count_bce`."""
    (cut, options), out = row_tiling(logits), scratch(bins, logits.device)
    align = alignment(logits)
    with torch.cuda.device_of(logits):
        count_softmax_kernel[(cut.programs,)](
            *arguments(logits, index, weight, align),
            out,
            out[bins + 1 :].view(torch.float64),
            cut.tiles,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 1),
            FILL=max(1, LANES * options["num_warps"] // cut.block_r),
            **cut.constants(logits.shape[1], align),
            **options,
        )
    return out


def weighted_softmax(
    logits: Tensor,
    index: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    weighted: bool,
    reduce: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss (scalar or `[R]`, float32) and, when asked for, the gradient of its sum."""
    cut, options = row_tiling(logits)
    loss = torch.empty(
        cut.programs if reduce else len(logits), dtype=torch.float32, device=logits.device
    )
    slope = torch.empty_like(logits) if gradient else logits.new_empty(0)
    align = alignment(logits, slope)
    with torch.cuda.device_of(logits):
        softmax_kernel[(cut.programs,)](
            *arguments(logits, index, weight, align),
            *(table, scale, None, None),
            *(loss, slope if gradient else None, *strides(slope if gradient else None, align)),
            cut.tiles,
            LOSS="sum" if reduce else "entries",
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(logits.shape[1], align),
            **options,
        )
        return sum_partials(loss, scale) if reduce else loss, slope


def weighted_softmax_backward(
    logits: Tensor,
    index: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    weighted: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype and layout; `grad_loss` is scalar or `[R]`."""
    cut, options = row_tiling(logits)
    slope = torch.empty_like(logits)
    align = alignment(logits, slope)
    with torch.cuda.device_of(logits):
        softmax_kernel[(cut.programs,)](
            *arguments(logits, index, weight, align),
            *(table, scale, grad_loss, outer_strides(grad_loss)[0]),
            *(None, slope, *strides(slope, align)),
            cut.tiles,
            LOSS=None,
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(logits.shape[1], align),
            **options,
        )
    return slope


# fmt: off
@triton.jit
def load_rows(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Logits (0 where ignored or past the end), the own logits, classes, weights, validity, harm.

    All but the first are `[BLOCK_R, 1]`. `harm` is NaN where a valid row's class is none.
    """
    first = tl.zeros([], tl.int32)
    exists = entries(tile_r, first, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    logits = at(logits_ptr, tile_r, first, logits_row, logits_col, ALIGN, BLOCK_R, BLOCK_C)
    x = tl.load(logits, mask=exists, other=0.0).to(tl.float32)
    label = load_labels(target_ptr, target_row, tile_r, rows, cols, BLOCK_R)
    weight, valid = load_weight(
        weight_ptr, weight_row, 0, tile_r, first, label >= 0, 1, BLOCK_R, 1
    )
    # Read again, from the first cache: cheaper than to look for it among the row's lanes.
    own = at(logits_ptr, tile_r, first, logits_row, 0, ALIGN, BLOCK_R, 1)
    own += label.to(tl.int64) * logits_col
    logit = tl.load(own, mask=valid & (label < cols), other=0.0).to(tl.float32)
    harm = tl.where(valid & (label >= cols), float("nan"), 0.0)
    return tl.where(valid, x, 0.0), logit, label, weight, valid, harm


@triton.jit
def exponentials(x, logit, cols, WHOLE: tl.constexpr, BLOCK_C: tl.constexpr):
    """`exp(x - peak)`, 0 past the last class; that of the own class, with the same bits; `peak`."""
    if not WHOLE:
        x = tl.where(tl.arange(0, BLOCK_C)[None, :] < cols, x, float("-inf"))
    peak = tl.max(x, axis=1)[:, None]
    return tl.exp2((x - peak) * LOG2_E), tl.exp2((logit - peak) * LOG2_E), peak


@triton.jit
def row_region(e, mine, BINS: tl.constexpr):
    """The region of `1 - p_y`, which counting and weighing find alike.

    Floats added across lanes depend on the order, and the order on how a kernel's accesses are laid
    out. So integers are added, in steps of 2^-30.
    """
    total = tl.sum(in_steps(e), axis=1)[:, None]
    others = (total - in_steps(mine)).to(tl.float32) * STEP
    return unit_region(others * reciprocal(total.to(tl.float32) * STEP), BINS)


@triton.jit
def in_steps(e):
    """How many whole `STEP` an exponential is; the sum of a row needs more than 32 bits."""
    return (e * (1.0 / STEP)).to(tl.int32).to(tl.int64)


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_softmax_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    BINS: tl.constexpr, BLOCK_BINS: tl.constexpr, FILL: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of rows a program."""
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
        # Once a row; the others fill up what a histogram of few rows would leave to chance.
        counted = valid & (tl.arange(0, FILL)[None, :] == 0)
        region = tl.where(counted, row_region(e, mine, BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        harmed = tl.fma(x, 0.0, harmed + harm)  # 0 times what is not finite is NaN
    harm = tl.sum(tl.ravel(harmed), axis=0)
    add_counts(counts_ptr, histogram, harm != harm, BINS, BLOCK_BINS)
    rows_counted = tl.where(tl.arange(0, BLOCK_BINS) < BINS, histogram, 0)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(rows_counted, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "tiles"])
def softmax_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles: the loss (LOSS: "sum" a program, "entries", or None), the gradient, or both.

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
        own = label == tl.arange(0, BLOCK_C)[None, :]
        # Not 1 - p_y, which loses what is left when p_y is close to 1.
        others = tl.sum(tl.where(own, 0.0, e), axis=1)[:, None]
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
            slope = tl.where(own, -others, e) * inverse
            store_tile(
                gradient_ptr, gradient_row, gradient_col, (outer * factor) * slope,
                tile_r, first, rows, cols, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
            )
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on
