"""Step 3 for regression: authentic smooth L1, weighted by unit region.

Memory traffic, bytes an element, with `b` and `t` those of a prediction and of a target: forward
reads `b + t` and writes 4 a program (4 an element without reduction); backward reads `b + t` and
writes `b`. `label_weight` adds its own bytes to each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghm_triton._inputs import RegressionInputs
from ghm_triton.ops.binning import asl1_arguments, hypotenuse, load_asl1, unit_region
from ghm_triton.ops.tiles import OPTIONS, strides, sum_partials, tile_entries, tiling


def weighted_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    *,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `ghm_triton.reference.weighted_asl1`; the gradient has the predictions' dtype."""
    loss: Tensor = WeightedASL1.apply(inputs.pred, inputs, table, scale, mu, weighted, reduce)
    return loss


class WeightedASL1(torch.autograd.Function):
    """The forward kernel, and the backward kernel that computes everything anew."""

    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        inputs: RegressionInputs,
        table: Tensor,
        scale: Tensor,
        mu: float,
        weighted: bool,
        reduce: bool,
    ) -> Tensor:
        """The loss: scalar or `[R, C]`, float32."""
        ctx.save_for_backward(pred, inputs.target, inputs.weight, table, scale)
        ctx.options = (inputs.shape, mu, weighted, reduce)
        return forward_asl1(inputs, table, scale, mu, weighted, reduce)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the predictions; everything else is a constant."""
        pred, target, weight, table, scale = ctx.saved_tensors
        shape, mu, weighted, reduce = ctx.options
        inputs = RegressionInputs(pred, target, weight, shape)
        gradient = backward_asl1(inputs, table, scale, grad_loss, mu, weighted, reduce)
        return gradient, None, None, None, None, None, None


def forward_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """Launch the forward pass."""
    cut = tiling(inputs.pred)
    shape = (cut.programs,) if reduce else inputs.pred.shape
    out = torch.empty(shape, dtype=torch.float32, device=inputs.pred.device)
    with torch.cuda.device_of(out):
        asl1_forward_kernel[(cut.programs,)](
            *asl1_arguments(inputs),
            table,
            scale,
            out,
            MU=mu,
            WEIGHTED=weighted,
            REDUCE=reduce,
            BINS=table.numel(),
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            **OPTIONS,
        )
        return sum_partials(out, scale) if reduce else out


def backward_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    grad_loss: Tensor,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """Launch the backward pass: the gradient of the predictions, in their dtype and layout."""
    cut = tiling(inputs.pred)
    gradient = torch.empty_like(inputs.pred)
    with torch.cuda.device_of(gradient):
        if cut.tiles:
            asl1_backward_kernel[(cut.tiles,)](
                *asl1_arguments(inputs),
                table,
                scale,
                grad_loss,
                gradient,
                *((0, 0) if reduce else strides(grad_loss)),
                *strides(gradient),
                MU=mu,
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
def asl1_forward_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, out_ptr,
    MU: tl.constexpr, WEIGHTED: tl.constexpr, REDUCE: tl.constexpr,
    BINS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles: one partial sum a program, or every entry's loss to `out` `[R, C]`."""
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(cols, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        d, weight, valid, _ = load_asl1(
            pred_ptr, target_ptr, weight_ptr,
            pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile, BLOCK_R, BLOCK_C,
        )
        size = tl.abs(d)
        length = hypotenuse(d, MU)
        factor = tl.load(table_ptr + unit_region(size / length, BINS), mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        # sqrt(d^2 + mu^2) - mu loses every digit when d << mu; this form keeps them.
        loss = factor * (size * (size / (length + MU)))
        if REDUCE:
            total += loss
        else:
            row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
            tl.store(out_ptr + row * cols + col, loss * tl.load(scale_ptr), mask=exists)
    if REDUCE:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))


@triton.jit(do_not_specialize=["rows"])
def asl1_backward_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, grad_loss_ptr, gradient_ptr,
    grad_loss_row, grad_loss_col, gradient_row, gradient_col,
    MU: tl.constexpr, WEIGHTED: tl.constexpr, REDUCE: tl.constexpr,
    BINS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One tile a program: `grad_loss * scale * table[region] * d / sqrt(d^2 + mu^2)`."""
    tile = tl.program_id(0)
    d, weight, valid, _ = load_asl1(
        pred_ptr, target_ptr, weight_ptr,
        pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
        tile, BLOCK_R, BLOCK_C,
    )
    slope = d / hypotenuse(d, MU)
    factor = tl.load(table_ptr + unit_region(tl.abs(slope), BINS), mask=valid, other=0.0)
    if WEIGHTED:
        factor = factor * tl.where(valid, weight, 0.0)
    row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
    if REDUCE:
        outer = tl.load(grad_loss_ptr)
    else:
        grad_loss = grad_loss_ptr + row * grad_loss_row + col * grad_loss_col
        outer = tl.load(grad_loss, mask=exists, other=0.0)
    # All in float32: a loss scale must reach a float16 gradient before it is rounded.
    gradient = (outer.to(tl.float32) * tl.load(scale_ptr)) * factor * slope
    at = gradient_ptr + row * gradient_row + col * gradient_col
    tl.store(at, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)
# fmt: on
