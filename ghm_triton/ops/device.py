"""Functions of the kernels: the arithmetic of an entry, the walk over tiles, loads and stores.

Counting and weighing share it, without contraction, so that an entry is weighed by the region that
it is counted in. Each special function is one instruction: `exp2`, `rsqrt` and an approximate
division, where `exp` and an exact one would guard against operands that cannot occur.

Counting walks forwards and weighing backwards: the tail of the input, which counting read last, is
still in the second-level cache when weighing starts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(not isinstance(tl.cdiv, triton.JITFunction))
LOG2_E = tl.constexpr(1.4426950408889634)

# log(1 + e) / e on [0, 1] with a relative error of 3e-8 (Remez): as exact in float32 as a logarithm
# with an eighth of its instructions, also for small e.
L0 = tl.constexpr(0.9999999403953552)
L1 = tl.constexpr(-0.4999949336051941)
L2 = tl.constexpr(0.3331909775733948)
L3 = tl.constexpr(-0.2484298199415207)
L4 = tl.constexpr(0.19106003642082214)
L5 = tl.constexpr(-0.13663239777088165)
L6 = tl.constexpr(0.07822588086128235)
L7 = tl.constexpr(-0.029505198821425438)
L8 = tl.constexpr(0.005232685245573521)


@triton.jit
def reciprocal(y):
    """`1 / y` for `1 <= y`, up to infinity; exact for 1 and 2."""
    if INTERPRETED:  # the interpreter has no device library
        inverse = 1.0 / y
    else:
        inverse = libdevice.fast_dividef(1.0, y)
    return inverse


@triton.jit
def log1p(e):
    """`log(1 + e)` for `0 <= e <= 1`."""
    series = tl.fma(e, L8, L7)
    series = tl.fma(e, series, L6)
    series = tl.fma(e, series, L5)
    series = tl.fma(e, series, L4)
    series = tl.fma(e, series, L3)
    series = tl.fma(e, series, L2)
    series = tl.fma(e, series, L1)
    series = tl.fma(e, series, L0)
    return e * series


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`; the exponential may be infinite, and nothing cancels."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def bce_slope(x, target, INDEX: tl.constexpr):
    """`p - p*`; with class indices `target` is a boolean.

    `u = (1 - 2 p*) x` has `g = sigmoid(u)`, so that a positive's gradient does not cancel.
    """
    if INDEX:
        norm = sigmoid(tl.where(target, -x, x))
        slope = tl.where(target, -norm, norm)
    else:
        slope = sigmoid(x) - target
    return slope


@triton.jit
def bce(x, target, INDEX: tl.constexpr):
    """Binary cross entropy."""
    if INDEX:
        linear = tl.maximum(tl.where(target, -x, x), 0.0)
    else:
        linear = tl.maximum(x, 0.0) - x * target
    return linear + log1p(tl.exp2(tl.abs(x) * -LOG2_E))


@triton.jit
def asl1(d, MU: tl.constexpr):
    """`sqrt(d^2 + mu^2) - mu` and its slope `d / sqrt(d^2 + mu^2)`.

    In units of `mu`, and without squaring what would overflow: far out the slope is 1.
    """
    size = tl.abs(d)
    units = tl.minimum(size * (1.0 / MU), 1e15)
    square = 1.0 + units * units
    inverse = tl.rsqrt(square)
    slope = units * inverse
    # sqrt(d^2 + mu^2) - mu loses every digit when d << mu; this form keeps them.
    loss = size * (units * reciprocal(1.0 + square * inverse))
    return loss, tl.where(d < 0.0, -slope, slope)


@triton.jit
def unit_region(norm, BINS: tl.constexpr):
    """Return the region of a norm; `g = 1` belongs to the last one.

    Unsigned, so that the compiler sees the bounds and a histogram need not check them.
    """
    return tl.minimum((norm * BINS).to(tl.uint32), BINS - 1)


@triton.jit
def first_tile(tile, cols, BLOCK_C: tl.constexpr):
    """Return row and column of a tile, counted in tiles; a row of tiles is walked by columns."""
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tile // column_tiles, tile % column_tiles


@triton.jit
def next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """Return the tile one step on, where a step is `first_tile` of the number of programs.

    Without a division, which would cost as much as an entry.
    """
    column_tiles = tl.cdiv(cols, BLOCK_C)
    tile_r += step_r
    tile_c += step_c
    over = tile_c >= column_tiles
    return tl.where(over, tile_r + 1, tile_r), tl.where(over, tile_c - column_tiles, tile_c)


@triton.jit
def previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """Return the tile one step back."""
    tile_r -= step_r
    tile_c -= step_c
    under = tile_c < 0
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tl.where(under, tile_r - 1, tile_r), tl.where(under, tile_c + column_tiles, tile_c)


@triton.jit
def entries(
    tile_r, tile_c, rows, cols, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mask the entries of a tile that exist.

    WHOLE: tiles fit into the columns, so that rows alone decide and loads stay wide.
    """
    row = tl.arange(0, BLOCK_R)[:, None]
    exists = row < tl.minimum(rows - tile_r.to(tl.int64) * BLOCK_R, BLOCK_R).to(tl.int32)
    if not WHOLE:
        exists = exists & (tl.arange(0, BLOCK_C)[None, :] < cols - tile_c * BLOCK_C)
    return tl.broadcast_to(exists, [BLOCK_R, BLOCK_C])


@triton.jit
def at(
    pointer,
    tile_r,
    tile_c,
    row_units,
    col_stride,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return pointers to a tile's entries `[BLOCK_R, BLOCK_C]`; constant terms can be hoisted.

    Rows lie `ALIGN * row_units` entries apart, from which the compiler infers their alignment.
    """
    row = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    corner = tile_r.to(tl.int64) * BLOCK_R * row_units * ALIGN
    corner += tile_c.to(tl.int64) * BLOCK_C * col_stride
    return (pointer + corner) + (row * row_units * ALIGN + col * col_stride)


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
