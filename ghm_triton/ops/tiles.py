"""What the kernels share: how `[R, C]` is cut into tiles, and the walk over them.

Counting walks forwards and weighing backwards, so that weighing finds the tail of the input, which
counting read last, in the second-level cache.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Entries of a tile: 16 a thread, so that what a tile costs is shared by many.
TILE = 2048
# Columns of a tile. With few, the labels of a row are loaded once and the tails stay short.
MAX_BLOCK_C = 16
# Programs that a multiprocessor holds at a time, at 128 registers a thread: all of a kernel's run
# from the start, and none is left over for a second round.
PROGRAMS_EACH = 4
MAX_PROGRAMS = 1024
# Without contraction a shared helper gives the same bits in every kernel that calls it: the region
# that an entry is counted in is the region whose weight it gets.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


class Tiling(NamedTuple):
    """How many tiles cover `[R, C]`, their shape, and how many programs walk over them.

    The number of programs depends on the device alone, so partial sums are cut the same way at
    every run. It is at least 1: empty input needs no exception.
    """

    tiles: int
    block_r: int
    block_c: int
    programs: int

    def constants(self, cols: int, align: int) -> dict[str, int | bool]:
        """The constants of a kernel that walks over `cols` columns."""
        whole = cols % self.block_c == 0
        return {
            "WHOLE": whole,
            "ALIGN": align,
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
        }


def tiling(tensor: Tensor) -> Tiling:
    """The tiles of a `[R, C]` tensor."""
    rows, cols = tensor.shape
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(max(1, cols)))
    while block_c > 4 and triton.cdiv(cols, block_c) * block_c > 1.125 * cols > 18:
        block_c //= 2  # narrower, so that less of the last tile hangs over
    block_r = TILE // block_c
    tiles = triton.cdiv(rows, block_r) * triton.cdiv(cols, block_c)
    return Tiling(tiles, block_r, block_c, max(1, min(tiles, most_programs(tensor.device))))


def most_programs(device: torch.device) -> int:
    """How many programs walk on a device when there is work for all."""
    if device.type != "cuda":  # the interpreter
        return MAX_PROGRAMS
    return min(MAX_PROGRAMS, PROGRAMS_EACH * _multiprocessors(device))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def alignment(*tensors: Tensor | None) -> int:
    """The largest power of two up to 16 that divides the row strides of all matrices given.

    Said to the compiler as a constant, so that loads are as wide as it allows; of a number it
    would only see whether 16 divides it.
    """
    return math.gcd(16, *(t.stride(0) for t in tensors if t is not None and t.dim() == 2))


def pointer(tensor: Tensor | None) -> Tensor | None:
    """What a kernel is given for `tensor`: booleans as bytes, None as None."""
    if tensor is not None and tensor.dtype == torch.bool:
        return tensor.view(torch.uint8)
    return tensor


def strides(tensor: Tensor | None, align: int = 1) -> tuple[int, int]:
    """Row stride in units of `align` entries and column stride in entries.

    A vector has one entry a row, and its stride in entries; None has no strides.
    """
    if tensor is None:
        return 0, 0
    if tensor.dim() == 1:
        return tensor.stride(0), 0
    return tensor.stride(0) // align, tensor.stride(1)


@triton.jit
def first_tile(tile, cols, BLOCK_C: tl.constexpr):
    """Row and column of a tile, counted in tiles; rows of tiles are walked column by column."""
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tile // column_tiles, tile % column_tiles


@triton.jit
def next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """The tile one step on, where a step is `first_tile` of the number of programs.

    Without a division, which would cost as much as an entry.
    """
    column_tiles = tl.cdiv(cols, BLOCK_C)
    tile_r += step_r
    tile_c += step_c
    over = tile_c >= column_tiles
    return tl.where(over, tile_r + 1, tile_r), tl.where(over, tile_c - column_tiles, tile_c)


@triton.jit
def previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """The tile one step back."""
    tile_r -= step_r
    tile_c -= step_c
    under = tile_c < 0
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tl.where(under, tile_r - 1, tile_r), tl.where(under, tile_c + column_tiles, tile_c)


@triton.jit
def entries(
    tile_r, tile_c, rows, cols, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Which entries of a tile exist.

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
    """Pointers to a tile's entries `[BLOCK_R, BLOCK_C]`; what does not change is left to hoist.

    Rows lie `ALIGN * row_units` entries apart: what the compiler knows of their alignment.
    """
    row = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    corner = tile_r.to(tl.int64) * BLOCK_R * row_units * ALIGN
    corner += tile_c.to(tl.int64) * BLOCK_C * col_stride
    return (pointer + corner) + (row * row_units * ALIGN + col * col_stride)
