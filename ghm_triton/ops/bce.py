"""Step 3 for classification: binary cross entropy, weighted by unit region.

Memory traffic, bytes an element, with `b` those of a logit (4 float32, 2 float16 and bfloat16):
forward reads `b + 8 / C` with class indices, `b + t` with dense targets of `t` bytes, and writes 4
a program (4 an element without reduction); backward reads the same and writes `b`. The table of
weights is 4 bytes a unit region and stays in the first cache. With `count_bce` that is `4 b` for
a training step with class indices: 16 bytes an element in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghm_triton._inputs import ClassificationInputs
from ghm_triton.ops.binning import bce_arguments, bce_terms, load_bce, unit_region
from ghm_triton.ops.tiles import OPTIONS, strides, sum_partials, tile_entries, tiling


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `ghm_triton.reference.weighted_bce`; the gradient has the logits' dtype and shape."""
    loss: Tensor = WeightedBCE.apply(inputs.logits, inputs, table, scale, weighted, reduce)
    return loss


class WeightedBCE(torch.autograd.Function):
    """The forward kernel, and the backward kernel that computes everything anew."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        inputs: ClassificationInputs,
        table: Tensor,
        scale: Tensor,
        weighted: bool,
        reduce: bool,
    ) -> Tensor:
        """The loss: scalar or `[R, C]`, float32."""
        ctx.save_for_backward(logits, inputs.index, inputs.target, inputs.weight, table, scale)
        ctx.options = (inputs.shape, weighted, reduce)
        return forward_bce(inputs, table, scale, weighted, reduce)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits; everything else is a constant."""
        logits, index, target, weight, table, scale = ctx.saved_tensors
        shape, weighted, reduce = ctx.options
        inputs = ClassificationInputs(logits, index, target, weight, shape)
        gradient = backward_bce(inputs, table, scale, grad_loss, weighted, reduce)
        return gradient, None, None, None, None, None


def forward_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, weighted: bool, reduce: bool
) -> Tensor:
    """Launch the forward pass."""
    cut = tiling(inputs.logits)
    shape = (cut.programs,) if reduce else inputs.logits.shape
    out = torch.empty(shape, dtype=torch.float32, device=inputs.logits.device)
    with torch.cuda.device_of(out):
        bce_forward_kernel[(cut.programs,)](
            *bce_arguments(inputs),
            table,
            scale,
            out,
            INDEX=inputs.index is not None,
            WEIGHTED=weighted,
            REDUCE=reduce,
            BINS=table.numel(),
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            **OPTIONS,
        )
        return sum_partials(out, scale) if reduce else out


def backward_bce(
    inputs: ClassificationInputs,
    table: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """Launch the backward pass: the gradient of the logits, in their dtype and layout."""
    cut = tiling(inputs.logits)
    gradient = torch.empty_like(inputs.logits)
    with torch.cuda.device_of(gradient):
        if cut.tiles:
            bce_backward_kernel[(cut.tiles,)](
                *bce_arguments(inputs),
                table,
                scale,
                grad_loss,
                gradient,
                *((0, 0) if reduce else strides(grad_loss)),
                *strides(gradient),
                INDEX=inputs.index is not None,
                WEIGHTED=weighted,
                REDUCE=reduce,
                BINS=table.numel(),
                BLOCK_R=cut.block_r,
                BLOCK_C=cut.block_c,
                **OPTIONS,
            )
    return gradient


# fmt: off
@triton.jit(do_not_specialize=["rows"])
def bce_forward_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, out_ptr,
    INDEX: tl.constexpr, WEIGHTED: tl.constexpr, REDUCE: tl.constexpr,
    BINS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles: one partial sum a program, or every entry's loss to `out` `[R, C]`."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(cols, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, weight, valid, _ = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile, INDEX, BLOCK_R, BLOCK_C,
        )
        gradient, linear, logarithm = bce_terms(x, target, INDEX)
        region = unit_region(tl.abs(gradient), BINS)
        factor = tl.load(table_ptr + region, mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        loss = factor * (linear + logarithm)
        if REDUCE:
            total += loss
        else:
            row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
            tl.store(out_ptr + row * cols + col, loss * tl.load(scale_ptr), mask=exists)
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))


@triton.jit(do_not_specialize=["rows"])
def bce_backward_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, grad_loss_ptr, gradient_ptr,
    grad_loss_row, grad_loss_col, gradient_row, gradient_col,
    INDEX: tl.constexpr, WEIGHTED: tl.constexpr, REDUCE: tl.constexpr,
    BINS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One tile a program: `grad_loss * scale * table[region] * (p - p*)`."""
    tile = tl.program_id(0)
    x, target, weight, valid, _ = load_bce(
        logits_ptr, target_ptr, weight_ptr,
        logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
        tile, INDEX, BLOCK_R, BLOCK_C,
    )
    gradient, _, _ = bce_terms(x, target, INDEX)
    region = unit_region(tl.abs(gradient), BINS)
    factor = tl.load(table_ptr + region, mask=valid, other=0.0)
    if WEIGHTED:
        factor = factor * tl.where(valid, weight, 0.0)
    row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
    if REDUCE:
        outer = tl.load(grad_loss_ptr)
    else:
        grad_loss = grad_loss_ptr + row * grad_loss_row + col * grad_loss_col
        outer = tl.load(grad_loss, mask=exists, other=0.0)
    # All in float32, and the outer factors first: a loss scale must reach a float16 gradient
    # before it is rounded.
    gradient = (outer.to(tl.float32) * tl.load(scale_ptr)) * factor * gradient
    at = gradient_ptr + row * gradient_row + col * gradient_col
    tl.store(at, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
# fmt: on
