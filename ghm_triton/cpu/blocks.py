"""Blocks of a tensor, and the memory to work in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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
    return all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        and unpack_dual(tensor).tangent is None  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


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

    def read(self, tensor: Tensor, out: int | None = None) -> Tensor:
        """Return this block of `[R, C]` as flat float32, possibly the memory of the tensor.

        Args:
            tensor: What to read.
            out: The buffer for a contiguous tensor of another dtype; None allocates, which
                made GHM-C with dense bfloat16 targets up to 1.8 times as slow on two threads.
        """
        if tensor.is_contiguous():
            part = tensor.view(-1)[self.flat]
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
