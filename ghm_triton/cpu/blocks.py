"""Blocks of a tensor, the memory to work in, and the unit regions of a block.

Both find the region as `reference.unit_region` does: multiply by `M` in float32 and truncate, with
`g = 1` in the last region. An index of up to 126 regions fits a byte, and two neighbours are
counted or looked up as one 16-bit code: half as many of the steps that do not vectorise.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs, SoftmaxInputs

# Entries per block and thread: 1 MiB per float32 buffer. Three or four buffers are in use, and
# larger ones do not stay in the cache; in smaller ones the calls cost as much as the arithmetic.
ENTRIES = 262144
MAX_THREADS = 2  # blocks grow with up to this many threads, which bounds the memory

MAX_VIEWS = 128  # of buffers that are kept
# Buffers of working memory, by what they hold most of the time.
SLOPE, WEIGHT, LOSS, TARGET, *MORE = range(8)

Inputs = ClassificationInputs | RegressionInputs | SoftmaxInputs
_local = threading.local()


def block_entries() -> int:
    """Return the entries per block for the number of threads that torch uses."""
    return ENTRIES * min(torch.get_num_threads(), MAX_THREADS)


def supports(inputs: Inputs, *constants: Tensor) -> bool:
    """Return whether float32 arithmetic on the memory of these tensors gives the result.

    It does not in float64, on another device, in a subclass of `Tensor`, while compiling or
    exporting, within a transform of `torch.func` or with a forward-mode tangent. The specification
    runs on all of them.
    """
    if torch.compiler.is_compiling():
        return False
    tensors = [value for value in vars(inputs).values() if isinstance(value, Tensor)]
    return tensors[0].dtype != torch.float64 and holds_numbers(*tensors, *constants)


def holds_numbers(*tensors: Tensor) -> bool:
    """Return whether the memory of these tensors is on the CPU and holds their values."""
    for tensor in tensors:
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or not tensor.is_cpu
            or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            or torch._C._functorch.is_legacy_batchedtensor(tensor)
        ):
            return False
    if forward_ad._current_level < 0:  # there are no tangents, and asking takes a microsecond each
        return True
    tangents = (forward_ad.unpack_dual(tensor).tangent for tensor in tensors)  # type: ignore[no-untyped-call]
    return all(tangent is None for tangent in tangents)


class Block(NamedTuple):
    """A block of a tensor `[R, C]`: whole rows or a part of one row, contiguous when flattened."""

    rows: slice
    columns: slice
    flat: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def entries(self) -> int:
        """Number of entries."""
        return int(self.flat.stop - self.flat.start)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return this block of a tensor `[R, C]`, or its rows of `[R, 1]`."""
        return tensor[self.rows, self.columns if tensor.shape[1] > 1 else slice(None)]

    def flatten(self, tensor: Tensor) -> Tensor:
        """Return this block of a contiguous tensor as a vector, in its memory."""
        whole = tensor.view(-1)
        return whole if whole.shape[0] == self.entries else whole[self.flat]

    def read(self, tensor: Tensor, out: int | None = None) -> Tensor:
        """Return this block of `[R, C]` as flat float32, possibly the memory of the tensor.

        Args:
            tensor: What to read.
            out: The buffer for a contiguous tensor of another dtype; None allocates, which
                made GHM-C with dense bfloat16 targets up to 1.8 times as slow on two threads.
        """
        if tensor.is_contiguous():
            part = self.flatten(tensor)
            if out is None or tensor.dtype == torch.float32:
                return part.to(torch.float32)
            return buffer(out, self.entries).copy_(part)
        return tensor[self.rows, self.columns].to(torch.float32).reshape(-1)


def blocks(rows: int, columns: int) -> Iterator[Block]:
    """Yield the blocks of a tensor in the order of memory."""
    most = reserve()
    height = max(1, most // columns)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        for left in range(0, columns, most):
            right = min(left + most, columns)
            flat = slice(top * columns + left, (bottom - 1) * columns + right)
            yield Block(slice(top, bottom), slice(left, right), flat)


def reserve() -> int:
    """Make room for blocks in the working memory of the calling thread; return their entries.

    It is kept between calls: the first access to new memory takes longer than the arithmetic.
    """
    most = block_entries()
    if getattr(_local, "capacity", 0) < most:
        _local.capacity, _local.memory, _local.views = most, {}, {}
    return most


def buffer(number: int, entries: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return working memory that `reserve` made, `[entries]`; its content is undefined.

    Args:
        number: Which of the buffers.
        entries: How many; a buffer has 4 bytes per entry of a block.
        dtype: How to see the memory of the buffer.
    """
    views: dict[tuple[int, int, torch.dtype], Tensor] = _local.views
    key = number, entries, dtype
    if key not in views:
        if len(views) >= MAX_VIEWS:
            views.clear()
        with torch.inference_mode(False):  # usable outside as well
            if number not in _local.memory:
                size = (_local.capacity + 15) // 8 * 8  # room for pairs
                _local.memory[number] = torch.empty(size, dtype=torch.float32, device="cpu")
            views[key] = _local.memory[number].view(dtype)[:entries]
    return views[key]


# An index runs to M (g = 1, before it joins the last region) and M + 1 (not counted), in a signed
# byte. The first byte of a pair has to be the lower one.
MAX_PAIRED = 126 if sys.byteorder == "little" else 0
BYTE = 256


class RegionCounter:
    """Counts the gradient norms of one block after another into `bins` unit regions."""

    def __init__(self, bins: int) -> None:
        self._bins = bins
        self._paired = bins <= MAX_PAIRED
        self._codes = np.zeros((bins + 2) * (BYTE if self._paired else 1), dtype=np.int64)

    def add(self, norm: Tensor, keep: Tensor | None) -> None:
        """Count a block; overwrites the buffer `LOSS`.

        Args:
            norm: float32 `[n]`, in [0, 1]; overwritten.
            keep: 1 for entries to count and 0 for others, `[h, w]` or `[h, 1]` with `h w = n`; None
                counts all.
        """
        outside = self._bins + 1
        regions, codes = _find(norm, self._bins, norm, outside)
        if keep is not None:
            # Arithmetic, as filling by a mask costs a mispredicted branch at every change.
            rows = regions.view(keep.shape[0], -1)
            rows.sub_(outside).mul_(keep.to(regions.dtype)).add_(outside)
        if self._paired:
            firsts = codes.numpy().view(np.uint8)
            np.add(firsts, _lanes(self._bins + 2, block_entries())[: firsts.size], out=firsts)
        self._codes += torch.bincount(codes, minlength=self._codes.size).numpy()

    def regions(self) -> Tensor:
        """Return the entries in each unit region, int64 `[M]`."""
        counts, indices = self._codes, self._bins + 2
        if self._paired:
            pairs = counts.reshape(indices, BYTE)
            lanes = pairs.sum(0)[: BYTE // indices * indices].reshape(-1, indices)
            counts = pairs.sum(1) + lanes.sum(0)
        regions = counts[: self._bins].copy()
        regions[-1] += counts[self._bins]
        return torch.from_numpy(regions)


@functools.lru_cache(maxsize=8)
def _lanes(indices: int, entries: int) -> NDArray[np.uint8]:
    """Return offsets for paired indices, `[entries]` or more, that spread the counts.

    Most norms fall into the same regions, and a counter that was just incremented is slow to
    increment again. The first byte of a code has room for several copies of every index, which the
    pairs use in turn.
    """
    lanes = np.zeros((entries // 2 + 1, 2), dtype=np.uint8)
    lanes[:, 0] = np.arange(len(lanes)) % (BYTE // indices) * indices
    return lanes.reshape(-1)


class RegionTable:
    """The weights of the unit regions, float32 `[M]`, looked up per block."""

    def __init__(self, weights: NDArray[np.float32]) -> None:
        self._bins = weights.size
        self._paired = self._bins <= MAX_PAIRED
        stored: NDArray[Any] = np.append(weights, weights[-1])  # g = 1 is in the last region
        if self._paired:
            pairs = np.empty((stored.size, BYTE, 2), dtype=np.float32)
            pairs[:, : stored.size, 0] = stored
            pairs[:, : stored.size, 1] = stored[:, None]
            stored = pairs.reshape(-1).view(np.int64)  # two float32 in one move of 64 bits
        self._table = torch.from_numpy(stored)

    def look_up(self, norm: Tensor) -> Tensor:
        """Return the weight of every entry in the buffer `WEIGHT`; overwrites `LOSS` as well.

        Args:
            norm: float32 `[n]`, in [0, 1]; may be the same buffer.
        """
        entries = norm.shape[0]
        weight = buffer(WEIGHT, entries)
        _, codes = _find(norm, self._bins, weight, 0)
        if self._paired:
            # Behind the bytes, which take a quarter of the buffer.
            half = codes.shape[0]
            wide = buffer(LOSS, 2 * half, torch.int32)[half:].copy_(codes)
            pairs = buffer(WEIGHT, half, torch.int64)
            torch.index_select(self._table, 0, wide, out=pairs)
        else:
            torch.index_select(self._table, 0, codes, out=weight)
        return weight


@functools.lru_cache
def _scale(bins: int) -> Tensor:
    """Return the number of regions as a tensor, which a call handles faster."""
    with torch.inference_mode(False):  # usable outside as well
        return torch.tensor(float(bins), dtype=torch.float32, device="cpu")


def _find(norm: Tensor, bins: int, out: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Return the index of each entry's region, 0 to `M`, and the same memory as codes.

    Args:
        norm: float32 `[n]`.
        bins: `M`.
        out: float32 `[n]`; receives `norm * M`.
        pad: The index that pairs with an odd last one.
    """
    torch.mul(norm, _scale(bins), out=out)
    entries = norm.shape[0]
    if bins > MAX_PAIRED:
        indices = buffer(LOSS, entries, torch.int32)
        return indices.copy_(out), indices
    codes = buffer(LOSS, (entries + 1) // 2, torch.int16)
    if entries % 2:
        codes[-1] = pad * BYTE
    return buffer(LOSS, entries, torch.int8).copy_(out), codes
