"""The sum of the partial losses in a fixed order, and the scaling of a saved gradient.

Memory traffic: `sum_partials` reads 4 bytes per program of the kernel before it, at most 4 KiB.
`scale_gradient` reads 4 bytes when the factor is 1, as it is in `loss.backward()`; otherwise it
reads and writes the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops.tiles import OPTIONS, TILE, most_programs


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
