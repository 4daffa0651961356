"""Logits and targets of a block, for either kind of target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.blocks import (
    Selection,
    Source,
    Span,
    blank,
    cut,
    finite,
    scalar,
)
from ghm_triton.reference.interface import ClassificationInputs

BITS_OF_ONE = 0x3F800000  # of float32
WINDOW = 65536  # rows whose class indices are looked at together


class Reader(ABC):
    """Reads one block after another in float32.

    Attributes:
        inputs: All of them, logits detached.
        selection: Which entries take part.
        keep: The same of the last block read, as `Selection.kept` gives it.
    """

    keep: Tensor | None = None

    def __init__(self, inputs: ClassificationInputs, ignoring: Tensor | None = None) -> None:
        logits = inputs.logits.detach()
        given = inputs.index, inputs.target, inputs.weight, inputs.shape
        self.inputs = ClassificationInputs(logits, *given)
        self.selection = Selection(inputs.weight, ignoring)
        self._source = Source(logits)

    def read(self, span: Span, *, counted: bool = False) -> bool:
        """Read a block.

        Args:
            span: Which one.
            counted: Whether entries that take part are known to be sound.

        Returns:
            False if an entry that takes part is not sound, or may not be.
        """
        self._logits = self._source.read(span)
        self.keep = self.selection.kept(span)
        self._read_targets(span)
        if (counted and self.keep is None) or self._sound():
            return True
        if self.keep is None:
            return False
        self._logits = blank(self._logits, self.keep, span.shape)
        self._blank_targets(self.keep, span)
        return self._sound()

    def _sound(self) -> bool:
        return self._targets_sound() and finite(self._logits)

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
    def slope(self, out: Tensor) -> Tensor:
        """`p - p*`, of the foreground `p* - p`; `out`."""

    @abstractmethod
    def norm(self, slope: Tensor, out: Tensor) -> Tensor:
        """`|p - p*|` of this slope; `out`, which may be `slope`, or `slope` itself."""

    @abstractmethod
    def losses(self, slope: Tensor, out: Tensor) -> Tensor:
        """Cross entropy of every entry, from the slope, which is overwritten; `out`."""

    @abstractmethod
    def flip(self, slope: Tensor) -> None:
        """Turn the slopes of the foreground to `p - p*` in place."""

    @abstractmethod
    def _read_targets(self, span: Span) -> None: ...

    @abstractmethod
    def _targets_sound(self) -> bool: ...

    @abstractmethod
    def _blank_targets(self, keep: Tensor, span: Span) -> None: ...


class IndexReader(Reader):
    """Class indices `[R]`.

    With `u = (1 - 2 p*) x` the norm is `g = sigmoid(u)` and cross entropy `softplus(u)`. All
    entries are taken for background, `u = x`, and those few of the foreground put right. In numpy,
    to which a call on few numbers is a small matter.
    """

    def __init__(self, inputs: ClassificationInputs, index: Tensor) -> None:
        self._classes = inputs.logits.shape[1]
        # As unsigned numbers those below 0 are large: one look finds all that is out of the usual.
        self._index: NDArray[np.uint64] = index.numpy().view(np.uint64)
        usual = not index.numel() or bool(self._index.max() <= self._classes)
        self._in_range = usual or int(index.max()) <= self._classes
        super().__init__(inputs, None if usual else index)
        self._window = slice(0, 0)

    def positives(self, span: Span) -> float:
        """The number of foreground entries that take part."""
        if self.keep is None:
            return float(self._places.size)
        return float(
            self.keep.expand(span.shape).numpy()[np.divmod(self._places, span.shape[1])].sum()
        )

    def slope(self, out: Tensor) -> Tensor:
        """`g`."""
        torch.sigmoid(self._logits, out=out)
        out.numpy()[self._places] = self._norms[self._here]
        return out

    def norm(self, slope: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002 - there is no need
        """The slope before it is flipped."""
        return slope

    def losses(self, slope: Tensor, out: Tensor) -> Tensor:
        """`softplus(u) = max(u, 0) - log(1 - sigmoid(-|u|))`.

        `sigmoid(-|u|)` is the smaller one of `g` and `1 - g`: where the latter loses digits, the
        loss is more than log 2, and they do not count.
        """
        torch.sub(slope, scalar(1.0), out=out)
        logarithm = torch.maximum(slope.neg_(), out, out=slope).log1p_()
        torch.clamp(self._logits, min=0.0, out=out)
        out.numpy()[self._places] = np.maximum(self._u[self._here], 0.0)
        return out.sub_(logarithm)

    def flip(self, slope: Tensor) -> None:
        """Change their sign."""
        slope.numpy()[self._places] *= -1.0

    def _read_targets(self, span: Span) -> None:
        rows, window = span.rows, self._window
        if not (window.start <= rows.start and rows.stop <= window.stop):
            self._look(slice(rows.start, max(rows.stop, rows.start + WINDOW)))
        first, last = self._all.searchsorted((span.flat.start, span.flat.stop))
        self._here = slice(first, last)
        self._places = self._all[self._here] - span.flat.start

    def _look(self, window: slice) -> None:
        """Find the foreground of many rows, and `u` and `g` there."""
        label = self._index[window]
        row = np.flatnonzero(label < self._classes)
        column = label[row].view(np.int64)
        row += window.start
        self._all = row * self._classes + column
        u = self._source.pick(row, column).neg_()
        self._u: NDArray[Any] = u.numpy()
        self._norms: NDArray[Any] = torch.sigmoid(u).numpy()
        self._window = window

    def _targets_sound(self) -> bool:
        return self._in_range

    def _blank_targets(self, keep: Tensor, span: Span) -> None:
        """As the logits of the foreground, with what follows from 0."""
        kept = keep.expand(span.shape).numpy()[np.divmod(self._places, span.shape[1])] > 0
        self._norms[self._here][~kept] = 0.5
        self._u[self._here][~kept] = 0.0


class DenseReader(Reader):
    """Dense targets `[R, C]`."""

    def __init__(self, inputs: ClassificationInputs, target: Tensor) -> None:
        super().__init__(inputs)
        self._targets = Source(target)

    def positives(self, span: Span) -> float:
        """Of a block in float32; blocks are added up in float64."""
        if self.keep is None:
            return float(self._target.sum())
        return float((self._target.view(span.shape) * self.keep).sum())

    def slope(self, out: Tensor) -> Tensor:
        """`sigmoid(x) - p*`."""
        return torch.sigmoid(self._logits, out=out).sub_(self._target)

    def norm(self, slope: Tensor, out: Tensor) -> Tensor:
        """In place, or not."""
        return torch.abs(slope, out=out)

    def losses(self, slope: Tensor, out: Tensor) -> Tensor:
        """`max(x, 0) - x p* - log(1 - sigmoid(-|x|))`."""
        logarithm = torch.abs(self._logits, out=slope).neg_().sigmoid_().neg_().log1p_()
        torch.clamp(self._logits, min=0.0, out=out)
        return out.addcmul_(self._logits, self._target, value=-1.0).sub_(logarithm)

    def flip(self, slope: Tensor) -> None:
        """Nothing to do: none is turned."""

    def _read_targets(self, span: Span) -> None:
        self._target = self._targets.read(span)

    def _targets_sound(self) -> bool:
        # As whole numbers the bits of [0, 1] are 0 to those of 1; of anything else, NaN and -0
        # included, they are larger.
        return bool(self._target.numpy().view(np.uint32).max() <= BITS_OF_ONE)

    def _blank_targets(self, keep: Tensor, span: Span) -> None:
        self._target = blank(self._target, keep, span.shape)


def reader(inputs: ClassificationInputs) -> Reader:
    """A reader for these targets."""
    if inputs.index is not None:
        return IndexReader(inputs, inputs.index)
    if inputs.target is None:
        raise TypeError("these inputs hold neither class indices nor dense targets")
    return DenseReader(inputs, inputs.target)
