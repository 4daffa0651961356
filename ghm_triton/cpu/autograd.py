"""A weighted loss and its gradient in one walk over the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ghm_triton.cpu.blocks import Span, hold_numbers
from ghm_triton.cpu.scratch import Views, walk

# Whether this backward pass leaves the graph for another one. Where torch cannot tell: always.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class Former(Protocol):
    """What forms the loss and the gradient of one block after another.

    Attributes:
        values: `[R, C]`, what the gradient belongs to, detached.
        given: Every tensor that is read.
        nothing: The loss of no entries: 0, or NaN for NaN weights.
    """

    values: Tensor
    given: tuple[Tensor, ...]
    nothing: float

    def form(
        self, span: Span, views: Views, gradient: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        """Form a block.

        Args:
            span: Which one.
            views: What to work on.
            gradient: `[n]`, where the gradient goes; or None.
            factor: Multiplies the gradient, a scalar or `[n]`; None: 1.

        Returns:
            The losses `[n]`, in scratch memory.
        """


def differentiable(former: Former, values: Tensor, reduce: bool) -> Tensor:
    """The sum of the losses, or each; float32, differentiable in `values`.

    The gradient is formed in the forward pass, as nothing more than a product with the outer
    gradient is left to do then, and is kept in the dtype of `values`. Not so for float16, where
    what has yet to be multiplied by a loss scale may be too small: its gradient is formed in the
    backward pass.

    Raises:
        RuntimeError: In a backward pass through the gradient.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        return _Blockwise.apply(values, former, reduce)  # type: ignore[no-any-return]
    return _walk(former, None, reduce)


def by_definition(
    loss: Callable[[Tensor], Tensor],
    values: Tensor,
    gradient: Tensor | None,
    factor: Tensor | None,
) -> Tensor:
    """`Former.form` by autograd, from a function of the values that gives the losses `[h, w]`."""
    values = values.detach().to(torch.float32)
    if gradient is None:
        return loss(values).view(-1)
    with torch.enable_grad():
        entries = loss(values.requires_grad_())
        (slope,) = torch.autograd.grad(entries.sum(), values)
    gradient.copy_(slope.view(-1) if factor is None else slope.view(-1) * factor)
    return entries.detach().view(-1)


def write(
    gradient: Tensor,
    slope: Tensor,
    weight: Tensor,
    factor: Tensor | None,
    finish: Callable[[Tensor], None] | None = None,
) -> None:
    """Put `slope * weight * factor` into the gradient, in float32 until it is there.

    Args:
        gradient: `[n]`.
        slope: float32 `[n]`.
        weight: float32 `[n]`.
        factor: A scalar or `[n]`; None: 1.
        finish: What is to be done to the product.
    """
    product = torch.mul(slope, weight, out=gradient if gradient.dtype == torch.float32 else None)
    if factor is not None:
        product.mul_(factor)
    if finish is not None:
        finish(product)
    if product is not gradient:
        gradient.copy_(product)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, former: Former, reduce: bool) -> Tensor:
        ctx.former = None
        if values.dtype == torch.float16:
            ctx.former = former
            # For what autograd sees to: freed memory and inputs that were changed are errors.
            ctx.save_for_backward(*former.given)
            return _walk(former, None, reduce)
        gradient = torch.empty(values.shape, dtype=values.dtype, device="cpu")
        ctx.save_for_backward(gradient)
        return _walk(former, gradient, reduce)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        saved, former = ctx.saved_tensors, ctx.former
        if not _keeps_graph():
            ctx.former = None
        if torch.is_grad_enabled():  # somebody may differentiate what is returned
            with torch.no_grad():
                gradient = _gradient(saved, former, outer)
            return _Once.apply(gradient.requires_grad_()), None, None
        return _gradient(saved, former, outer), None, None


class _Once(torch.autograd.Function):
    """Nothing, unless it is differentiated."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, _outer: Tensor) -> Tensor:
        raise RuntimeError(
            "a harmonized loss in float32, float16 or bfloat16 can be differentiated once: its"
            " gradient is formed with it. In float64 it can be any number of times."
        )


def _walk(former: Former, gradient: Tensor | None, reduce: bool) -> Tensor:
    shape = former.values.shape
    entries = None if reduce else torch.empty(shape, dtype=torch.float32, device="cpu")
    total = former.nothing  # in double precision, over sums of blocks
    slopes = None if gradient is None else gradient.view(-1)
    for span, views in walk(*shape):
        part = None if slopes is None else slopes[span.flat]
        loss = former.form(span, views, part, None)
        if entries is None:
            total += float(loss.sum())
        else:
            entries.view(-1)[span.flat] = loss
    if entries is not None:
        return entries
    return torch.from_numpy(np.array(total)).float()


def _gradient(saved: tuple[Tensor, ...], former: Former | None, outer: Tensor) -> Tensor:
    return _scale(saved[0], outer) if former is None else _form(former, outer)


def _form(former: Former, outer: Tensor) -> Tensor:
    gradient = torch.empty(former.values.shape, dtype=former.values.dtype, device="cpu")
    flat = gradient.view(-1)
    for span, views in walk(*gradient.shape):
        factor = outer[span.rows, span.columns].reshape(-1) if outer.dim() else outer
        former.form(span, views, flat[span.flat], factor)
    return gradient


def _scale(gradient: Tensor, outer: Tensor) -> Tensor:
    if _keeps_graph() or not hold_numbers(outer):
        return (gradient * outer).to(gradient.dtype)
    # Nobody will ask for this one again: no second copy of it.
    if outer.dim() == 0 and float(outer) == 1.0:
        return gradient
    return gradient.mul_(outer)
