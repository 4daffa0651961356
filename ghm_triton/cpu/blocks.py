"""Which tensors can be taken a block at a time, the blocks, and the memory to work on them.

A torch call costs a microsecond or more whatever it does, and every block makes some thirty: what
can be found once is not found once a block.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs

# Entries a block and thread: 1 MiB a float32 buffer, of which three or four are in use. More do not
# stay in the caches; with fewer, calls cost as much as arithmetic.
ENTRIES = 262144
MOST_THREADS = 2  # that blocks grow with: memory is not to


def block_entries() -> int:
    """Entries a block, for as many threads as torch uses."""
    return ENTRIES * min(torch.get_num_threads(), MOST_THREADS)


def applies_to(inputs: ClassificationInputs | RegressionInputs) -> bool:
    """Whether every tensor holds numbers, here and now, that need no more than float32.

    Not so: on another device, in float64, while compiling or exporting, within a transform of
    `torch.func` or with a forward-mode tangent. The specification runs on all of these.
    """
    tensors = [value for value in vars(inputs).values() if isinstance(value, Tensor)]
    return tensors[0].dtype != torch.float64 and hold_numbers(*tensors)


def hold_numbers(*tensors: Tensor) -> bool:
    """Whether these are tensors of the CPU and no stand-ins for any."""
    return not torch.compiler.is_compiling() and all(_holds_numbers(each) for each in tensors)


def _holds_numbers(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
        and unpack_dual(tensor).tangent is None  # type: ignore[no-untyped-call]
    )


class Span(NamedTuple):
    """Where a block is: whole rows, or a part of one; so it is contiguous if the tensor is."""

    rows: slice
    columns: slice
    flat: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def entries(self) -> int:
        """How many there are."""
        return int(self.flat.stop - self.flat.start)


def spans(rows: int, columns: int) -> Iterator[Span]:
    """Cut `[rows, columns]` into blocks of whole rows, or a part of one, in the order of memory."""
    most = block_entries()
    height = max(1, most // columns)
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        for left in range(0, columns, most):
            right = min(left + most, columns)
            flat = slice(top * columns + left, (bottom - 1) * columns + right)
            yield Span(slice(top, bottom), slice(left, right), flat)


class Source:
    """A tensor `[R, C]` of any strides and dtype, read as flat float32."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._flat = tensor.view(-1) if tensor.is_contiguous() else None

    def read(self, span: Span) -> Tensor:
        """A block: not to be written to, for it may be the tensor's own memory."""
        if self._flat is None:
            return self._tensor[span.rows, span.columns].to(torch.float32).reshape(-1)
        return self._flat[span.flat].to(torch.float32)

    def pick(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Tensor:
        """Single entries, a copy."""
        if self._flat is None:
            picked = self._tensor[torch.from_numpy(rows), torch.from_numpy(columns)]
        else:
            places = torch.from_numpy(rows * self._tensor.shape[1] + columns)
            picked = self._flat.index_select(0, places)
        return picked.to(torch.float32)


class Selection:
    """Which entries take part: `label_weight > 0` and a class index that is not negative.

    Args:
        weight: `[R, C]`, or None.
        index: `[R]` class indices if any of them is negative, or None.
    """

    def __init__(self, weight: Tensor | None, index: Tensor | None = None) -> None:
        if weight is not None and weight.stride(1) == 0:
            weight = weight[:, :1]  # one a row, expanded: no need to look in every column
        self._weight = weight
        self._index = index

    def kept(self, span: Span) -> Tensor | None:
        """1 where an entry takes part and 0 where not, float32 `[h, w]` or `[h, 1]`; None: all."""
        keep = None
        if self._weight is not None:
            # To a float at once: a bool costs several times as much to make and to multiply by.
            weight = self._cut(self._weight, span)
            keep = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            torch.gt(weight, 0, out=keep)
        if self._index is not None:
            rows = (self._index[span.rows] >= 0).to(torch.float32).unsqueeze(1)
            keep = rows if keep is None else keep * rows
        return keep

    def apply(self, values: Tensor, span: Span, keep: Tensor | None, *, weighted: bool) -> None:
        """Make 0 what takes no part, and multiply the rest by `label_weight` if `weighted`.

        Args:
            values: `[h * w]`, finite.
            span: Which block.
            keep: What `kept` says of it.
            weighted: Whether `label_weight` multiplies.
        """
        if keep is None:
            return
        values = values.view(span.shape)
        if weighted and self._weight is not None:
            weight = self._cut(self._weight, span).to(torch.float32)
            if self._index is not None:  # an infinite weight of an ignored row is not looked at
                weight = torch.where((self._index[span.rows] >= 0).unsqueeze(1), weight, 0.0)
            values.mul_(weight.nan_to_num(0.0, posinf=math.inf).clamp_(min=0.0))
        values.mul_(keep)

    def _cut(self, weight: Tensor, span: Span) -> Tensor:
        return weight[span.rows, span.columns if weight.shape[1] > 1 else slice(None)]


@functools.lru_cache(maxsize=64)
def scalar(number: float) -> Tensor:
    """A number as torch has it sooner at hand: float32, of no dimensions."""
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.float32, device="cpu")


def blank(values: Tensor, keep: Tensor, shape: tuple[int, int]) -> Tensor:
    """A copy with 0 wherever an entry takes no part: nothing is asked of what lies there."""
    return torch.where(keep > 0, values.view(shape), 0.0).view(-1)


def finite(values: Tensor) -> bool:
    """Whether every entry surely is finite: their sum is.

    False as well when the sum alone overflows; the specification then takes a closer look.
    """
    return math.isfinite(float(values.sum()))


@overload
def cut(tensor: Tensor, span: Span) -> Tensor: ...
@overload
def cut(tensor: Tensor | None, span: Span) -> Tensor | None: ...
def cut(tensor: Tensor | None, span: Span) -> Tensor | None:
    """The block of a tensor `[R, C]`."""
    return None if tensor is None else tensor[span.rows, span.columns]
