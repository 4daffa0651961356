"""Tiles and launchers that all kernels share, and their registration as operators of PyTorch.

As operators, `torch.ops.ghm.*`, kernels are opaque to `torch.compile` and `torch.export`: each
registers its results' shapes, its side effects and its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ghm_triton.ops.device import INTERPRETED
from ghm_triton.reference.interface import RegionCounts

# Entries of a tile: 16 per thread, so that many entries share the cost of a tile.
TILE = 2048
# Columns of a tile. With few, the labels of a row are loaded once and the tails stay short.
MAX_BLOCK_C = 16
# Programs that a multiprocessor holds at a time, at 128 registers per thread: all programs of a
# kernel run from the start, and none is left for a second round.
PROGRAMS_EACH = 4
MAX_PROGRAMS = 1024
WARPS = 4
# Without contraction a shared helper gives the same bits in every kernel that calls it: an entry is
# weighed by the region that it is counted in.
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}


class Tiling(NamedTuple):
    """Tiles that cover an `[R, C]` tensor.

    The number of programs depends on the device alone, so partial sums are cut alike at every run.
    It is at least 1, for empty tensors too.

    Attributes:
        tiles: Number of tiles.
        block_r: Rows of a tile.
        block_c: Columns of a tile.
        programs: Programs that walk over the tiles.
        warps: Warps of a program.
    """

    tiles: int
    block_r: int
    block_c: int
    programs: int
    warps: int = WARPS

    def constants(self, cols: int, align: int) -> dict[str, Any]:
        """Compile-time arguments and options of a kernel that walks over `cols` columns."""
        return {
            "WHOLE": cols % self.block_c == 0,
            "ALIGN": align,
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
            **OPTIONS,
            "num_warps": self.warps,
        }


def tiling(tensor: Tensor) -> Tiling:
    """Cut an `[R, C]` tensor into tiles."""
    rows, cols = tensor.shape
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(max(1, cols)))
    while block_c > 4 and triton.cdiv(cols, block_c) * block_c > 1.125 * cols > 18:
        block_c //= 2  # narrower, so that less of the last tile hangs over
    block_r = TILE // block_c
    tiles = triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c)
    return Tiling(tiles, block_r, block_c, max(1, min(tiles, most_programs(tensor.device))))


def most_programs(device: torch.device) -> int:
    """Return the number of programs that fill a device."""
    if device.type != "cuda":  # the interpreter
        return MAX_PROGRAMS
    return min(MAX_PROGRAMS, PROGRAMS_EACH * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*tensors: Tensor | None) -> int:
    """Return the largest power of two up to 16 that divides the row strides of all matrices.

    A compile-time constant, so that loads are as wide as it allows; of an argument the compiler
    only sees whether 16 divides it.
    """
    return math.gcd(16, *(t.stride(0) for t in tensors if t is not None and t.dim() == 2))


def pointer(tensor: Tensor | None) -> Tensor | None:
    """View booleans as bytes, which kernels take; other tensors and None are returned as given."""
    if tensor is not None and tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    return tensor


def strides(tensor: Tensor | None, align: int = 1) -> tuple[int, int]:
    """Return the row stride in units of `align` entries, and the column stride in entries.

    A vector has one entry per row, and its stride in entries; None has strides of 0.
    """
    if tensor is None:
        return 0, 0
    if tensor.dim() == 1:
        return tensor.stride(0), 0
    return tensor.stride(0) // align, tensor.stride(1)


LIBRARY = torch.library.Library("ghm", "FRAGMENT")
# Interpreted kernels run on CPU tensors.
DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


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


def sum_partials(partials: Tensor, scale: Tensor) -> Tensor:
    """Compute `scale * partials.sum()`, float32 scalar, with the same bits at every run."""
    total = torch.empty((), dtype=torch.float32, device=partials.device)
    block = triton.next_power_of_2(partials.numel())
    sum_partials_kernel[(1,)](partials, scale, total, partials.numel(), BLOCK=block, **OPTIONS)
    return total


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a gradient, dense in any order of its dimensions, in place; skipped for 1."""
    # In the order of memory; a gradient made by `empty_like` has no holes.
    flat = gradient.as_strided((gradient.numel(),), (1,))
    programs = max(1, min(triton.cdiv(flat.numel(), TILE), most_programs(flat.device)))
    with torch.cuda.device_of(flat):
        scale_kernel[(programs,)](flat, factor, flat.numel(), BLOCK=TILE, **OPTIONS)


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(partials_ptr, scale_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """One program. The tree of `tl.sum` depends on BLOCK alone; float64 costs nothing here."""
    index = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + index, mask=index < count, other=0.0).to(tl.float64)
    scale = tl.load(scale_ptr).to(tl.float64)
    tl.store(total_ptr, (tl.sum(partials, axis=0) * scale).to(tl.float32))


@triton.jit
def scale_kernel(gradient_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """Walk over the gradient unless the factor is 1, without synchronising with the host."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        for _ in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
            gradient = tl.load(gradient_ptr + offset, mask=offset < count, other=0.0)
            gradient = gradient.to(tl.float32) * factor
            at = gradient_ptr + offset
            tl.store(at, gradient.to(gradient_ptr.dtype.element_ty), mask=offset < count)
            offset += step


define("scale_gradient(Tensor(a!) gradient, Tensor factor) -> ()", scale_gradient, lambda *_: None)
