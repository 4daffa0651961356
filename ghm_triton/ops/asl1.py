"""Step 3 for regression: authentic smooth L1, weighted by unit region, and its gradient.

Memory traffic, bytes an element, with `b` and `t` those of a prediction and of a target: loss and
gradient together read `b + t` and write `b`; after `count_asl1` a training step moves `3 b + 2 t`.
`label_weight` adds its own bytes to each pass. Without reduction, and in float16, the gradient has
a pass of its own, as in `bce.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops.arithmetic import asl1, unit_region
from ghm_triton.ops.loads import arguments, load_difference, load_outer, outer_strides, store_tile
from ghm_triton.ops.scaling import sum_partials
from ghm_triton.ops.tiles import (
    OPTIONS,
    alignment,
    first_tile,
    previous_tile,
    strides,
    tiling,
)


def weighted_asl1(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    mu: float,
    weighted: bool,
    reduce: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss (scalar or `[R, C]`, float32) and, when asked for, the gradient of its sum."""
    cut = tiling(pred)
    shape = (cut.programs,) if reduce else pred.shape
    loss = torch.empty(shape, dtype=torch.float32, device=pred.device)
    slope = torch.empty_like(pred) if gradient else pred.new_empty(0)
    align = alignment(pred, target, weight, slope)
    with torch.cuda.device_of(pred):
        asl1_kernel[(cut.programs,)](
            *arguments(pred, target, weight, align),
            *(table, scale, None, None, None),
            *(loss, slope if gradient else None, *strides(slope if gradient else None, align)),
            cut.tiles,
            LOSS="sum" if reduce else "entries",
            MU=mu,
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(pred.shape[1], align),
            **OPTIONS,
        )
        return sum_partials(loss, scale) if reduce else loss, slope


def weighted_asl1_backward(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    mu: float,
    weighted: bool,
) -> Tensor:
    """The gradient of the predictions, in their dtype and layout."""
    cut = tiling(pred)
    slope = torch.empty_like(pred)
    align = alignment(pred, target, weight, slope)
    with torch.cuda.device_of(pred):
        asl1_kernel[(cut.programs,)](
            *arguments(pred, target, weight, align),
            *(table, scale, grad_loss),
            *outer_strides(grad_loss),
            *(None, slope, *strides(slope, align)),
            cut.tiles,
            LOSS=None,
            MU=mu,
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(pred.shape[1], align),
            **OPTIONS,
        )
    return slope


# fmt: off
@triton.jit(do_not_specialize=["rows", "tiles"])
def asl1_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, MU: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles: the loss (LOSS: "sum" a program, "entries", or None), the gradient, or both.

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
        if LOSS == "sum":
            total = tl.fma(factor, entry, total)
        if LOSS == "entries":
            store_tile(
                loss_ptr, cols, 1, factor * entry * scale,
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
        tile_r, tile_c = previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on
