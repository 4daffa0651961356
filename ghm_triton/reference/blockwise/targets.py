"""Logits and targets of a block, for either kind of target."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ghm_triton._inputs import ClassificationInputs
from ghm_triton.reference.blockwise.blocks import (
    Selection,
    Source,
    Span,
    blank,
    cut,
    finite,
    flip,
)

WINDOW = 65536  # rows whose class indices are looked at together
Flips = tuple[Tensor, Tensor]


class Reader(ABC):
    """Reads one block after another in float32.

    Attributes:
        inputs: All of them, logits detached.
        selection: Which entries take part.
        keep: The same of the last block read, as `Selection.kept` gives it.
        flips: Where the slope of the last block is to change its sign yet, and which sign; or None.
    """

    keep: Tensor | None = None
    flips: Flips | None = None

    def __init__(self, inputs: ClassificationInputs, ignoring: Tensor | None) -> None:
        self.inputs = dataclasses.replace(inputs, logits=inputs.logits.detach())
        self.selection = Selection(inputs.weight, ignoring)
        self._logits = Source(self.inputs.logits)

    def read(self, span: Span, values: Tensor, *, counted: bool = False) -> bool:
        """Read a block.

        Args:
            span: Which one.
            values: `[n]`, where the logits go; with class indices `u = (1 - 2 p*) x` instead.
            counted: Whether entries that take part are known to be sound.

        Returns:
            False if an entry that takes part is not sound, or may not be.
        """
        self._logits.copy(span, values)
        self.keep = self.selection.kept(span)
        self._read_targets(span)
        if not (counted and self.keep is None) and not self._sound(values):
            if self.keep is None:
                return False
            values.copy_(blank(values, self.keep, span.shape))
            self._blank_targets(self.keep, span)
            if not self._sound(values):
                return False
        self._turn(values)
        return True

    def _sound(self, values: Tensor) -> bool:
        return self._targets_sound() and finite(values)

    def cut(self, span: Span) -> ClassificationInputs:
        """A block as inputs of its own."""
        given = self.inputs
        index = None if given.index is None else self._cut_index(given.index, span)
        logits = cut(given.logits, span)
        target, weight = cut(given.target, span), cut(given.weight, span)
        return ClassificationInputs(logits, index, target, weight, logits.shape)

    def _cut_index(self, index: Tensor, span: Span) -> Tensor:
        index, classes, width = index[span.rows], self.inputs.logits.shape[1], span.shape[1]
        if width == classes:
            return index
        # A part of a row sees its own classes; others are background to it, or out of range.
        own = index - span.columns.start
        own = torch.where((own >= 0) & (own < width), own, width)
        own = torch.where(index > classes, width + 1, own)
        return torch.where(index < 0, -1, own)

    @abstractmethod
    def positives(self, span: Span) -> float:
        """The sum of the last block's targets over the entries that take part."""

    @abstractmethod
    def slope(self, values: Tensor, out: Tensor) -> Tensor:
        """`p - p*`, before flips; `out`, which may be `values`."""

    @abstractmethod
    def losses(self, values: Tensor, slope: Tensor, spare: Tensor) -> Tensor:
        """Cross entropy of every entry, in place of one of the arguments; overwrites all."""

    @abstractmethod
    def _read_targets(self, span: Span) -> None: ...

    @abstractmethod
    def _targets_sound(self) -> bool: ...

    @abstractmethod
    def _blank_targets(self, keep: Tensor, span: Span) -> None: ...

    @abstractmethod
    def _turn(self, values: Tensor) -> None: ...


class IndexReader(Reader):
    """Class indices `[R]`: `u = (1 - 2 p*) x`, so that `g = sigmoid(u)` and `BCE = softplus(u)`."""

    flips: Flips

    def __init__(self, inputs: ClassificationInputs, index: Tensor) -> None:
        low, high = torch.aminmax(index) if len(index) else (index.new_zeros(()),) * 2
        self._ignores = int(low) < 0
        super().__init__(inputs, index if self._ignores else None)
        self._index = index
        self._classes = inputs.logits.shape[1]
        self._in_range = int(high) <= self._classes
        self._window = slice(0, 0)

    def positives(self, span: Span) -> float:
        """The number of foreground entries that take part."""
        places, signs = self.flips
        foreground = (1.0 - signs) / 2.0
        if self.keep is not None:
            foreground *= self.keep.expand(span.shape).reshape(-1)[places]
        return float(foreground.sum())

    def slope(self, values: Tensor, out: Tensor) -> Tensor:
        """`g`, whose sign is the other one in the foreground."""
        return torch.sigmoid(values, out=out)

    def losses(self, values: Tensor, slope: Tensor, spare: Tensor) -> Tensor:
        """`softplus(u) = max(u, 0) - log(1 - sigmoid(-|u|))`.

        `sigmoid(-|u|)` is the smaller one of `g` and `1 - g`: where the latter loses digits, the
        loss is more than log 2, and they do not count.
        """
        torch.sub(slope, 1.0, out=spare)
        logarithm = torch.maximum(slope.neg_(), spare, out=slope).log1p_()
        return values.clamp_(min=0.0).sub_(logarithm)

    def _read_targets(self, span: Span) -> None:
        """Find one entry a row, and -1 if it is in the foreground; else 1, wherever it is."""
        rows, window = span.rows, self._window
        if not (window.start <= rows.start and rows.stop <= window.stop):
            self._look(slice(rows.start, max(rows.stop, rows.start + WINDOW)))
        inside = slice(rows.start - self._window.start, rows.stop - self._window.start)
        places, signs = self._places[inside] - span.flat.start, self._signs[inside]
        if span.shape[1] < self._classes and not 0 <= int(places) < span.entries:
            places, signs = places[:0], signs[:0]  # it is in another part of the row
        self.flips = places, signs

    def _look(self, rows: slice) -> None:
        label = self._index[rows]
        foreground = label < self._classes
        if self._ignores:
            foreground &= label >= 0
        first = torch.arange(rows.start, rows.start + len(label), device="cpu")
        self._places = first.mul_(self._classes).add_(label.clamp(0, self._classes - 1))
        self._signs = foreground.to(torch.float32).mul_(-2.0).add_(1.0)
        self._window = rows

    def _targets_sound(self) -> bool:
        return self._in_range

    def _blank_targets(self, keep: Tensor, span: Span) -> None:
        """The sign of what is 0 does not matter."""

    def _turn(self, values: Tensor) -> None:
        flip(values, self.flips)


class DenseReader(Reader):
    """Dense targets `[R, C]`."""

    _block: Tensor

    def __init__(self, inputs: ClassificationInputs, target: Tensor) -> None:
        super().__init__(inputs, None)
        self._target = Source(target)

    def positives(self, span: Span) -> float:
        """Of a block in float32; blocks are added up in float64."""
        if self.keep is None:
            return float(self._block.sum())
        return float((self._block.view(span.shape) * self.keep).sum())

    def slope(self, values: Tensor, out: Tensor) -> Tensor:
        """`sigmoid(x) - p*`."""
        return torch.sigmoid(values, out=out).sub_(self._block)

    def losses(self, values: Tensor, slope: Tensor, spare: Tensor) -> Tensor:
        """`max(x, 0) - x p* - log(1 - sigmoid(-|x|))`."""
        logarithm = torch.abs(values, out=slope).neg_().sigmoid_().neg_().log1p_()
        torch.clamp(values, min=0.0, out=spare)
        return spare.addcmul_(values, self._block, value=-1.0).sub_(logarithm)

    def _read_targets(self, span: Span) -> None:
        self._block = self._target.read(span)

    def _targets_sound(self) -> bool:
        low, high = torch.aminmax(self._block)
        return bool(low >= 0) and bool(high <= 1)  # written so that NaN fails

    def _blank_targets(self, keep: Tensor, span: Span) -> None:
        self._block = blank(self._block, keep, span.shape)

    def _turn(self, values: Tensor) -> None:
        """Nothing to do."""


def reader(inputs: ClassificationInputs) -> Reader:
    """A reader for these targets."""
    if inputs.index is not None:
        return IndexReader(inputs, inputs.index)
    if inputs.target is None:
        raise TypeError("these inputs hold neither class indices nor dense targets")
    return DenseReader(inputs, inputs.target)
