"""Softmax GHM: counting by `g = 1 - p_y`, then cross entropy by unit region and its gradient.

An extension: neither the paper nor the released code has it. One entry a row; a row fits into a
tile, so up to MAX_CLASSES columns.

Memory traffic, bytes an element, with `b` those of a logit: counting reads `b + 8 / C`; loss and
gradient together read the same and write `b`: `3 b` a training step. Without reduction, and in
float16, the gradient has a pass of its own, as in `bce.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops.arithmetic import LOG2_E, log1p, reciprocal, unit_region
from ghm_triton.ops.binning import add_counts, scratch
from ghm_triton.ops.loads import arguments, load_labels, load_outer, outer_strides, store_tile
from ghm_triton.ops.scaling import sum_partials
from ghm_triton.ops.tiles import (
    OPTIONS,
    TILE,
    Tiling,
    alignment,
    at,
    entries,
    most_programs,
    strides,
)

MAX_CLASSES = 4096
LN_2 = tl.constexpr(0.6931471805599453)


def row_tiling(logits: Tensor) -> Tiling:
    """Tiles of whole rows."""
    rows, cols = logits.shape
    block_c = triton.next_power_of_2(cols)
    block_r = max(1, TILE // block_c)
    tiles = triton.cdiv(rows, block_r)
    return Tiling(tiles, block_r, block_c, max(1, min(tiles, most_programs(logits.device))))


def count_softmax(logits: Tensor, index: Tensor, weight: Tensor | None, bins: int) -> Tensor:
    """Count `1 - p_y` of the valid rows; the result is laid out as that of `count_bce`."""
    cut, out = row_tiling(logits), scratch(bins, logits.device)
    align = alignment(logits)
    with torch.cuda.device_of(logits):
        count_softmax_kernel[(cut.programs,)](
            *arguments(logits, index, weight, align),
            out,
            out[bins + 1 :].view(torch.float64),
            cut.tiles,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 1),
            **cut.constants(logits.shape[1], align),
            **OPTIONS,
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
    cut = row_tiling(logits)
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
            **OPTIONS,
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
    cut = row_tiling(logits)
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
            **OPTIONS,
        )
    return slope


# fmt: off
@triton.jit
def load_rows(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Logits (0 in ignored rows, -inf past the last class), classes, weights, validity, harm.

    All but the logits are `[BLOCK_R, 1]`. `harm` is NaN where a valid row's class is none.
    """
    first = tl.zeros([], tl.int32)
    exists = entries(tile_r, first, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    logits = at(logits_ptr, tile_r, first, logits_row, logits_col, ALIGN, BLOCK_R, BLOCK_C)
    x = tl.load(logits, mask=exists, other=0.0).to(tl.float32)
    label = load_labels(target_ptr, target_row, tile_r, rows, cols, BLOCK_R)
    valid = label >= 0
    if weight_ptr is None:
        weight = tl.full([BLOCK_R, 1], 1.0, tl.float32)
    else:
        one = at(weight_ptr, tile_r, first, weight_row, 0, 1, BLOCK_R, 1)
        exists = entries(tile_r, first, rows, cols, True, BLOCK_R, 1)
        weight = tl.load(one, mask=exists, other=0).to(tl.float32)
        valid = valid & (weight > 0)
    harm = tl.where(valid & (label >= cols), float("nan"), 0.0)
    x = tl.where(valid, x, 0.0)
    if not WHOLE:
        x = tl.where(tl.arange(0, BLOCK_C)[None, :] < cols, x, float("-inf"))
    return x, label, weight, valid, harm


@triton.jit
def softmax_parts(x, label, BLOCK_C: tl.constexpr):
    """Which entries are the rows' own, `exp(x - peak)`, and `[BLOCK_R, 1]`: peak, own, others."""
    own = label == tl.arange(0, BLOCK_C)[None, :]
    peak = tl.max(x, axis=1)[:, None]
    e = tl.exp2((x - peak) * LOG2_E)
    mine = tl.sum(tl.where(own, e, 0.0), axis=1)[:, None]
    # Not 1 - p_y, which loses what is left when p_y is close to 1.
    others = tl.sum(tl.where(own, 0.0, e), axis=1)[:, None]
    return own, e, peak, mine, others


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_softmax_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of rows a program.

    A row is compared with every region: few beside its classes, and a histogram of so few is none.
    """
    bins = tl.arange(0, BLOCK_BINS)
    counts = tl.zeros([BLOCK_R, BLOCK_BINS], tl.int32)
    harmed = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_r = tl.full([], tile, tl.int32)
        x, label, _, valid, harm = load_rows(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
            WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        _, _, _, mine, others = softmax_parts(x, label, BLOCK_C)
        region = unit_region(others * reciprocal(mine + others), BINS)
        counts += (valid & (region == bins[None, :])).to(tl.int32)
        finite = x if WHOLE else tl.where(tl.arange(0, BLOCK_C)[None, :] < cols, x, 0.0)
        harmed = tl.fma(finite, 0.0, harmed + harm)  # 0 times what is not finite is NaN
    harm = tl.sum(tl.ravel(harmed), axis=0)
    histogram = tl.sum(counts, axis=0)
    add_counts(counts_ptr, histogram, harm != harm, BINS, BLOCK_BINS)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(histogram, axis=0).to(tl.float64))


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
        x, label, weight, valid, _ = load_rows(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, weight_row, rows, cols, tile_r,
            WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        own, e, peak, mine, others = softmax_parts(x, label, BLOCK_C)
        inverse = reciprocal(mine + others)
        norm = others * inverse
        factor = tl.load(table_ptr + unit_region(norm, BINS), mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        if LOSS is not None:
            # log(1 + others / mine): as a series where that is small, so that it keeps its digits.
            mild = others <= mine
            logit = tl.sum(tl.where(own, x, 0.0), axis=1)[:, None]
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
            slope = tl.where(own, -norm, e * inverse)
            store_tile(
                gradient_ptr, gradient_row, gradient_col, (outer * factor) * slope,
                tile_r, first, rows, cols, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
            )
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on
