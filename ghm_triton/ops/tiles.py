"""Tiles of an `[R, C]` tensor, and the walk of a kernel's programs over them.

Counting walks forwards and weighing backwards: the tail of the input, which counting read last, is
still in the second-level cache when weighing starts.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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


@triton.jit
def first_tile(tile, cols, BLOCK_C: tl.constexpr):
    """Return row and column of a tile, counted in tiles; a row of tiles is walked by columns."""
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tile // column_tiles, tile % column_tiles


@triton.jit
def next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """Return the tile one step on, where a step is `first_tile` of the number of programs.

    Without a division, which would cost as much as an entry.
    """
    column_tiles = tl.cdiv(cols, BLOCK_C)
    tile_r += step_r
    tile_c += step_c
    over = tile_c >= column_tiles
    return tl.where(over, tile_r + 1, tile_r), tl.where(over, tile_c - column_tiles, tile_c)


@triton.jit
def previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C: tl.constexpr):
    """Return the tile one step back."""
    tile_r -= step_r
    tile_c -= step_c
    under = tile_c < 0
    column_tiles = tl.cdiv(cols, BLOCK_C)
    return tl.where(under, tile_r - 1, tile_r), tl.where(under, tile_c + column_tiles, tile_c)


@triton.jit
def entries(
    tile_r, tile_c, rows, cols, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Mask the entries of a tile that exist.

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
    """Return pointers to a tile's entries `[BLOCK_R, BLOCK_C]`; constant terms can be hoisted.

    Rows lie `ALIGN * row_units` entries apart, from which the compiler infers their alignment.
    """
    row = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    corner = tile_r.to(tl.int64) * BLOCK_R * row_units * ALIGN
    corner += tile_c.to(tl.int64) * BLOCK_C * col_stride
    return (pointer + corner) + (row * row_units * ALIGN + col * col_stride)
