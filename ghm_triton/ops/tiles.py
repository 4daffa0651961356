"""What the kernels share: how `[R, C]` is cut into tiles, and a sum in a fixed order.

Memory traffic: `sum_partials_kernel` reads 4 bytes a program of the kernel before it, 4 KiB at
most.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a tile: 8 a thread. 16 a thread spill in the forward kernel on sm_90.
TILE = 2048
# Columns of a tile. With few, the labels of a row are loaded once and the tails stay short.
MAX_BLOCK_C = 16
# Programs of a kernel that walks over many tiles: enough to fill a large GPU. A constant, so that
# partial sums are cut the same way on every device.
MAX_PROGRAMS = 1024
# Without contraction a shared helper gives the same bits in every kernel that calls it: the region
# that an entry is counted in is the region whose weight it gets.
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


class Tiling(NamedTuple):
    """How many tiles cover `[R, C]`, and their shape."""

    tiles: int
    block_r: int
    block_c: int

    @property
    def programs(self) -> int:
        """The grid of a kernel that walks: at least 1, so that empty input needs no exception."""
        return max(1, min(self.tiles, MAX_PROGRAMS))


def tiling(tensor: Tensor) -> Tiling:
    """The tiles of a `[R, C]` tensor."""
    rows, cols = tensor.shape
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(max(1, cols)))
    block_r = TILE // block_c
    return Tiling(triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c), block_r, block_c)


def pointer(tensor: Tensor | None) -> Tensor | None:
    """What a kernel is given for `tensor`: booleans as bytes, None as None."""
    if tensor is not None and tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    return tensor


def strides(tensor: Tensor | None) -> tuple[int, int]:
    """Row and column stride in entries; a vector has one entry a row, None has no strides."""
    if tensor is None:
        return 0, 0
    return (tensor.stride(0), 0) if tensor.dim() == 1 else (tensor.stride(0), tensor.stride(1))


def sum_partials(partials: Tensor, scale: Tensor) -> Tensor:
    """`scale * partials.sum()`, float32 scalar, the same bits at every run."""
    total = torch.empty((), dtype=torch.float32, device=partials.device)
    block = triton.next_power_of_2(partials.numel())
    sum_partials_kernel[(1,)](partials, scale, total, partials.numel(), BLOCK=block, **OPTIONS)
    return total


@triton.jit
def tile_entries(tile, rows, cols, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows `[BLOCK_R, 1]` and columns `[1, BLOCK_C]` of a tile, int64, and which of them exist."""
    column_tiles = tl.cdiv(cols, BLOCK_C)
    first_row = (tile // column_tiles).to(tl.int64) * BLOCK_R
    first_col = (tile % column_tiles).to(tl.int64) * BLOCK_C
    row = (first_row + tl.arange(0, BLOCK_R))[:, None]
    col = (first_col + tl.arange(0, BLOCK_C))[None, :]
    return row, col, (row < rows) & (col < cols)


@triton.jit(do_not_specialize=["count"])
def sum_partials_kernel(partials_ptr, scale_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """One program. The tree of `tl.sum` depends on BLOCK alone; float64 costs nothing here."""
    index = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + index, mask=index < count, other=0.0).to(tl.float64)
    scale = tl.load(scale_ptr).to(tl.float64)
    tl.store(total_ptr, (tl.sum(partials, axis=0) * scale).to(tl.float32))
