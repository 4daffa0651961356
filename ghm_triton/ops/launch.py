"""Launchers that all kernels share, and their registration as operators of PyTorch.

As operators, `torch.ops.ghm.*`, kernels are opaque to `torch.compile` and `torch.export`: each
registers its results' shapes, its side effects and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghm_triton.ops.interpreter import interpreting
from ghm_triton.ops.scaling import scale_gradient, sum_partials
from ghm_triton.ops.tiles import MAX_PROGRAMS, Tiling, alignment, pointer, strides, tiling
from ghm_triton.reference.interface import RegionCounts

LIBRARY = torch.library.Library("ghm", "FRAGMENT")
# Interpreted kernels run on CPU tensors.
DEVICES = ("CUDA", "CPU") if interpreting() else ("CUDA",)


def count(
    kernel: Any,
    values: Tensor,
    target: Tensor,
    weight: Tensor | None,
    bins: int,
    cut: Tiling | None = None,
    **constants: Any,
) -> Tensor:
    """Launch a counting kernel over the tiles of `values`.

    Counts are integers and added atomically: their sum does not depend on the order. The sums of
    positives are floats, so each program has a slot of its own.

    Returns:
        int64 `[bins + 1 + MAX_PROGRAMS]`: the count of each region; the number of programs with an
        entry that is not finite or out of range; the bits of the float64 partial sums of positives.
    """
    cut = cut or tiling(values)
    out = torch.zeros(bins + 1 + MAX_PROGRAMS, dtype=torch.int64, device=values.device)
    align = alignment(values, target, weight)
    with torch.cuda.device_of(values):
        kernel[(cut.programs,)](
            *_data(values, target, weight, align),
            *(out, out[bins + 1 :].view(torch.float64), cut.tiles),
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 1),
            **constants,
            **cut.constants(values.shape[1], align),
        )
    return out


def region_counts(counts: Tensor, bins: int) -> RegionCounts:
    """Split the result of `count`."""
    return RegionCounts(counts[:bins], counts[bins + 1 :].view(torch.float64), counts[bins])


def _data(
    values: Tensor, target: Tensor, weight: Tensor | None, align: int
) -> tuple[Tensor | int | None, ...]:
    """The leading arguments of every kernel over tiles: pointers, strides, shape."""
    return (
        *(values.detach(), pointer(target), pointer(weight)),
        *(*strides(values, align), *strides(target, align), *strides(weight, align)),
        *values.shape,
    )


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator with its launcher and its shape function."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, launch, device)
    torch.library.register_fake(f"ghm::{name}", fake, lib=LIBRARY)


def define_count(name: str, launch: Callable[..., Tensor], constants: str = "int bins") -> None:
    """Register a counting operator."""

    def fake(values: Tensor, _target: Tensor, _weight: Tensor | None, bins: int, *_: Any) -> Tensor:
        return values.new_empty(bins + 1 + MAX_PROGRAMS, dtype=torch.int64)

    schema = f"{name}(Tensor values, Tensor target, Tensor? weight, {constants}) -> Tensor"
    define(schema, launch, fake)


class LossOperator:
    """A weighted loss `torch.ops.ghm.NAME` with its gradient: one kernel for either or both.

    The gradient is computed in the same pass as the loss where that is safe (see `apply`), and
    otherwise from the same inputs by `torch.ops.ghm.NAME_backward`.

    Args:
        name: Of the operator.
        kernel: Takes the data, the factors, the upstream gradient, the outputs and constants.
        options: Schema of the options.
        constants: Compile-time arguments of the kernel, from the target, the factors and options.
        factors: Schema of the tensors that multiply the loss; the last is the scale of the sum.
        cut: The tiles of the values.
        rows: Whether an entry of the loss is a row of the values.
    """

    def __init__(
        self,
        name: str,
        kernel: Any,
        options: str,
        constants: Callable[..., dict[str, Any]],
        *,
        factors: str = "Tensor table, Tensor scale",
        cut: Callable[[Tensor], Tiling] = tiling,
        rows: bool = False,
    ) -> None:
        self.name, self.kernel, self.constants = name, kernel, constants
        self.cut, self.entry_dims = cut, 1 if rows else 2
        self.factors = len(factors.split(","))
        tensors = f"Tensor values, Tensor target, Tensor? weight, {factors}"
        outputs = "bool reduce, bool gradient) -> (Tensor, Tensor)"
        define(f"{name}({tensors}, {options}, {outputs}", self.forward, self._fake)
        define(
            f"{name}_backward({tensors}, Tensor grad_loss, {options}) -> Tensor",
            self.backward,
            lambda values, *_: torch.empty_like(values),
        )
        torch.library.register_autograd(
            f"ghm::{name}",
            once_differentiable(self._differentiate),
            setup_context=self._setup_context,
            lib=LIBRARY,
        )

    def apply(self, values: Tensor, *arguments: Any, reduce: bool) -> Tensor:
        """Compute the loss, differentiable once in `values`.

        The gradient is not computed with the loss in float16, where it would underflow before the
        loss scale multiplies it, nor under a compiler, which may not scale it in place: then a
        second pass moves fewer bytes.

        Args:
            values: `[R, C]`.
            *arguments: Target, weight, factors and options.
            reduce: Whether the loss is a scalar, or has one number for each entry.
        """
        needed = values.requires_grad and torch.is_grad_enabled()
        lasting = values.dtype != torch.float16 and not torch.compiler.is_compiling()
        operator = getattr(torch.ops.ghm, self.name)
        loss: Tensor = operator(values, *arguments, reduce, needed and reduce and lasting)[0]
        return loss

    def forward(
        self, values: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
    ) -> tuple[Tensor, Tensor]:
        """Launch the kernel for the loss, float32, and the gradient of its sum or an empty tensor.

        `arguments` are the factors, the options, `reduce` and `gradient`.
        """
        *options, reduce, gradient = arguments[self.factors :]
        factors, cut = arguments[: self.factors], self.cut(values)
        shape = (cut.programs,) if reduce else values.shape[: self.entry_dims]
        loss = torch.empty(shape, dtype=torch.float32, device=values.device)
        slope = torch.empty_like(values) if gradient else None
        mode = "sum" if reduce else "entries"
        with torch.cuda.device_of(values):
            self._launch(cut, (values, target, weight), factors, options, None, mode, loss, slope)
            total = sum_partials(loss, factors[-1]) if reduce else loss
        return total, values.new_empty(0) if slope is None else slope

    def backward(
        self, values: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
    ) -> Tensor:
        """Launch the kernel for the gradient alone, in the dtype and layout of `values`.

        `arguments` are the factors, the upstream gradient (a scalar, or one number for each entry)
        and the options.
        """
        grad_loss, *options = arguments[self.factors :]
        factors, slope = arguments[: self.factors], torch.empty_like(values)
        data = (values, target, weight)
        with torch.cuda.device_of(values):
            self._launch(self.cut(values), data, factors, options, grad_loss, None, None, slope)
        return slope

    def _launch(
        self,
        cut: Tiling,
        data: tuple[Tensor, Tensor, Tensor | None],
        factors: Sequence[Tensor],
        options: Sequence[Any],
        grad_loss: Tensor | None,
        mode: str | None,
        loss: Tensor | None,
        slope: Tensor | None,
    ) -> None:
        align = alignment(*data, slope)
        # None in place of strides: the upstream gradient is one number, or there is none.
        outer = strides(grad_loss) if grad_loss is not None and grad_loss.dim() else (None, None)
        self.kernel[(cut.programs,)](
            *_data(*data, align),
            *(*factors, grad_loss, *outer),
            *(loss, slope, *strides(slope, align), cut.tiles),
            LOSS=mode,
            **self.constants(data[1], factors, *options),
            **cut.constants(data[0].shape[1], align),
        )

    def _fake(self, values: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        *_, reduce, gradient = arguments
        shape = () if reduce else values.shape[: self.entry_dims]
        loss = values.new_empty(shape, dtype=torch.float32)
        return loss, torch.empty_like(values) if gradient else values.new_empty(0)

    def _setup_context(
        self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> None:
        tensors = 3 + self.factors
        ctx.formed = inputs[-1]
        ctx.options = inputs[tensors:-2]
        ctx.arguments = len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*((output[1],) if ctx.formed else inputs[:tensors]))

    def _differentiate(self, ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            gradient = _scaled(ctx.saved_tensors[0], grad_loss)
        else:
            again = getattr(torch.ops.ghm, f"{self.name}_backward")
            gradient = again(*ctx.saved_tensors, grad_loss, *ctx.options)
        return gradient, *(None,) * (ctx.arguments - 1)


def _scaled(gradient: Tensor, grad_loss: Tensor) -> Tensor:
    """Scale the saved gradient by the upstream gradient, in place unless the graph is retained."""
    if type(gradient) is not Tensor:  # a compiler's, which returns it to the caller
        return gradient * grad_loss
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    torch.ops.ghm.scale_gradient(gradient, grad_loss)
    return gradient


define("scale_gradient(Tensor(a!) gradient, Tensor factor) -> ()", scale_gradient, lambda *_: None)
