"""Reading and writing of tiles, with the validity of entries."""

from __future__ import annotations

import triton
import triton.language as tl

from ghm_triton.ops.tiles import at, entries


# fmt: off
@triton.jit
def load_bce(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    tile_r, tile_c,
    INDEX: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load a tile of logits (float32, 0 where not valid), targets, weights, validity and shares.

    Targets are boolean with class indices, else float32. Shares add up to the sum of the targets;
    they are NaN where a valid entry's target is out of range.
    """
    exists = entries(tile_r, tile_c, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    logits = at(logits_ptr, tile_r, tile_c, logits_row, logits_col, ALIGN, BLOCK_R, BLOCK_C)
    x = tl.load(logits, mask=exists, other=0.0).to(tl.float32)
    weight, valid = load_weight(
        weight_ptr, weight_row, weight_col, tile_r, tile_c, exists, ALIGN, BLOCK_R, BLOCK_C
    )
    if INDEX:
        label = load_labels(target_ptr, target_row, tile_r, rows, cols, BLOCK_R)
        valid = valid & (label >= 0)
        column = label - tile_c * BLOCK_C  # 32 bits: one instruction per comparison
        target = valid & (column == tl.arange(0, BLOCK_C)[None, :])
        if weight_ptr is None:
            # Computed once per row, of which each entry takes an equal share; exact powers of two.
            share = tl.where((column >= 0) & (column < BLOCK_C), 1.0 / BLOCK_C, 0.0)
            share = tl.where(label == cols, 0.0, share)
        else:
            share = tl.where(target, 1.0, 0.0)
        share = tl.where(valid & (label > cols), float("nan"), share)
    else:
        targets = at(target_ptr, tile_r, tile_c, target_row, target_col, ALIGN, BLOCK_R, BLOCK_C)
        target = tl.where(valid, tl.load(targets, mask=exists, other=0).to(tl.float32), 0.0)
        share = tl.where((target >= 0.0) & (target <= 1.0), target, float("nan"))
    return tl.where(valid, x, 0.0), target, weight, valid, share


@triton.jit
def load_labels(target_ptr, target_row, tile_r, rows, cols, BLOCK_R: tl.constexpr):
    """Load class indices `[BLOCK_R, 1]` in 32 bits: `cols + 1` for any above, -1 if ignored."""
    row = tl.arange(0, BLOCK_R)
    first = tile_r.to(tl.int64) * BLOCK_R
    exists = row < tl.minimum(rows - first, BLOCK_R).to(tl.int32)
    pointers = target_ptr + first * target_row + row.to(tl.int64) * target_row
    label = tl.load(pointers, mask=exists, other=-1)
    within = tl.minimum(label.to(tl.uint64), cols + 1).to(tl.int32)
    return tl.where(label < 0, -1, within)[:, None]


@triton.jit
def load_weight(
    weight_ptr, weight_row, weight_col, tile_r, tile_c, exists,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load `label_weight` in float32 and find the valid entries; without weights, 1 and all."""
    if weight_ptr is None:
        weight, valid = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32), exists
    else:
        weights = at(weight_ptr, tile_r, tile_c, weight_row, weight_col, ALIGN, BLOCK_R, BLOCK_C)
        stored = tl.load(weights, mask=exists, other=0)
        weight, valid = stored.to(tl.float32), exists & (stored > 0)
    return weight, valid


@triton.jit
def load_difference(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    tile_r, tile_c, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load a tile of `d = pred - target` (float32, 0 where not valid), weights and validity."""
    exists = entries(tile_r, tile_c, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    preds = at(pred_ptr, tile_r, tile_c, pred_row, pred_col, ALIGN, BLOCK_R, BLOCK_C)
    targets = at(target_ptr, tile_r, tile_c, target_row, target_col, ALIGN, BLOCK_R, BLOCK_C)
    pred = tl.load(preds, mask=exists, other=0.0)
    target = tl.load(targets, mask=exists, other=0.0)
    weight, valid = load_weight(
        weight_ptr, weight_row, weight_col, tile_r, tile_c, exists, ALIGN, BLOCK_R, BLOCK_C
    )
    d = pred.to(tl.float32) - target.to(tl.float32)
    return tl.where(valid, d, 0.0), weight, valid


@triton.jit
def load_outer(
    outer_ptr, outer_row, outer_col, scale, tile_r, tile_c, rows, cols,
    WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Load the upstream gradient, times `scale`; without strides it is one number.

    In float32, and multiplied first: a loss scale must reach a float16 gradient before rounding.
    """
    if outer_ptr is None:
        outer = scale
    elif outer_row is None:
        outer = tl.load(outer_ptr).to(tl.float32) * scale
    else:
        exists = entries(tile_r, tile_c, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
        outers = at(outer_ptr, tile_r, tile_c, outer_row, outer_col, 1, BLOCK_R, BLOCK_C)
        outer = tl.load(outers, mask=exists, other=0.0).to(tl.float32) * scale
    return outer


@triton.jit
def store_tile(
    pointer, row_units, col_stride, values, tile_r, tile_c, rows, cols,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Store a tile of values `[BLOCK_R, BLOCK_C]`, rounded to the pointer's dtype."""
    exists = entries(tile_r, tile_c, rows, cols, WHOLE, BLOCK_R, BLOCK_C)
    pointers = at(pointer, tile_r, tile_c, row_units, col_stride, ALIGN, BLOCK_R, BLOCK_C)
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def write_results(
    total, factor, loss, slope, scale, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tile_r, tile_c, rows, cols,
    LOSS: tl.constexpr, WHOLE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Add a tile's weighted losses to `total` or store them, and store its gradient.

    LOSS: "sum" (one number per program), "entries", or None.
    """
    if LOSS == "sum":
        total = tl.fma(factor, loss, total)
    if LOSS == "entries":
        store_tile(
            loss_ptr, cols, 1, factor * loss * scale,
            tile_r, tile_c, rows, cols, WHOLE, 1, BLOCK_R, BLOCK_C,
        )
    if gradient_ptr is not None:
        outer = load_outer(
            outer_ptr, outer_row, outer_col, scale,
            tile_r, tile_c, rows, cols, WHOLE, BLOCK_R, BLOCK_C,
        )
        store_tile(
            gradient_ptr, gradient_row, gradient_col, (outer * factor) * slope,
            tile_r, tile_c, rows, cols, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
    return total


@triton.jit
def add_counts(counts_ptr, histogram, harmed, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr):
    """Add a program's histogram to the counts; the last count is of programs that were harmed."""
    region = tl.arange(0, BLOCK_BINS)
    histogram = tl.where(region < BINS, histogram, harmed.to(tl.int32))
    present = (region <= BINS) & (histogram > 0)
    tl.atomic_add(counts_ptr + region, histogram.to(tl.int64), mask=present, sem="relaxed")
# fmt: on
