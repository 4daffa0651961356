"""Step 3 for classification: binary cross entropy, weighted by unit region, and its gradient.

Memory traffic, bytes an element, with `b` those of a logit (4 float32, 2 float16 and bfloat16):
loss and gradient together read `b + 8 / C` with class indices, `b + t` with dense targets of `t`
bytes, and write `b`. The table of weights is 4 bytes a unit region and stays in the first cache.
After `count_bce` that makes `3 b` for a training step with class indices: 12 bytes an element in
float32, 6 in bfloat16, the least there is: the loss cannot be known before everything is counted.

Two cases keep the gradient for a pass of its own, which reads the inputs again: without reduction,
and in float16, where a gradient that the loss scale has not reached yet would vanish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops.arithmetic import bce, bce_slope, unit_region
from ghm_triton.ops.loads import arguments, load_bce, load_outer, outer_strides, store_tile
from ghm_triton.ops.scaling import sum_partials
from ghm_triton.ops.tiles import (
    OPTIONS,
    alignment,
    first_tile,
    previous_tile,
    strides,
    tiling,
)


def weighted_bce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    weighted: bool,
    reduce: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss (scalar or `[R, C]`, float32) and, when asked for, the gradient of its sum."""
    cut = tiling(logits)
    shape = (cut.programs,) if reduce else logits.shape
    loss = torch.empty(shape, dtype=torch.float32, device=logits.device)
    slope = torch.empty_like(logits) if gradient else logits.new_empty(0)
    align = alignment(logits, target, weight, slope)
    with torch.cuda.device_of(logits):
        bce_kernel[(cut.programs,)](
            *arguments(logits, target, weight, align),
            *(table, scale, None, None, None),
            *(loss, slope if gradient else None, *strides(slope if gradient else None, align)),
            cut.tiles,
            LOSS="sum" if reduce else "entries",
            INDEX=target.dim() == 1,
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(logits.shape[1], align),
            **OPTIONS,
        )
        return sum_partials(loss, scale) if reduce else loss, slope


def weighted_bce_backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    table: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    weighted: bool,
) -> Tensor:
    """The gradient of the logits, in their dtype and layout; `grad_loss` is scalar or `[R, C]`."""
    cut = tiling(logits)
    slope = torch.empty_like(logits)
    align = alignment(logits, target, weight, slope)
    with torch.cuda.device_of(logits):
        bce_kernel[(cut.programs,)](
            *arguments(logits, target, weight, align),
            *(table, scale, grad_loss),
            *outer_strides(grad_loss),
            *(None, slope, *strides(slope, align)),
            cut.tiles,
            LOSS=None,
            INDEX=target.dim() == 1,
            WEIGHTED=weighted,
            BINS=table.numel(),
            **cut.constants(logits.shape[1], align),
            **OPTIONS,
        )
    return slope


# fmt: off
@triton.jit(do_not_specialize=["rows", "tiles"])
def bce_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, INDEX: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles: the loss (LOSS: "sum" a program, "entries", or None), the gradient, or both.

    The gradient is `outer * scale * table[region] * (p - p*)`, with `outer` 1 where there is none.
    """
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    scale = tl.load(scale_ptr)
    tile_r, tile_c = first_tile(tiles - 1 - tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, weight, valid, _ = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, INDEX, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        slope = bce_slope(x, target, INDEX)
        region = unit_region(tl.abs(slope), BINS)
        factor = tl.load(table_ptr + region, mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        if LOSS == "sum":
            total = tl.fma(factor, bce(x, target, INDEX), total)
        if LOSS == "entries":
            store_tile(
                loss_ptr, cols, 1, factor * bce(x, target, INDEX) * scale,
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
