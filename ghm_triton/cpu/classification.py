"""Logits and targets of a block, and the terms that BCE and the focal loss share."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.blocks import TARGET, Block
from ghm_triton.cpu.loss import BlockLoss, surely_finite
from ghm_triton.reference.interface import ClassificationInputs

BITS_OF_ONE = 0x3F800000  # of float32
ONE = torch.ones((), dtype=torch.float32, device="cpu")  # calls handle tensors faster
WINDOW = 65536  # rows whose class indices are searched together


class ClassificationLoss(BlockLoss):
    """A loss of logits and class indices or dense targets.

    With `u = (1 - 2 p*) x` the gradient norm of a class index is `sigmoid(u)` and cross entropy
    `softplus(u)`. Every entry is taken for background first, `u = x`, and the few entries of the
    foreground are corrected in numpy, where a call on few numbers is cheap.

    Attributes:
        counted: Whether every valid entry is known to be sound.
        logits: The last block, float32; 0 for unsound entries. Not to be written to.
        target: Its dense targets, float32; None with class indices.
    """

    counted = False
    logits: Tensor
    target: Tensor | None

    def __init__(
        self, inputs: ClassificationInputs, weights: Tensor | None = None, *, weighted: bool = False
    ) -> None:
        super().__init__(inputs, weights, weighted=weighted)
        self._dense = inputs.target
        self._labels: NDArray[np.uint64] | None = None
        self._window = slice(0, 0)
        self._u: NDArray[np.float32] = np.zeros(0, dtype=np.float32)  # of the foreground
        self._above: Tensor | None = None  # rows whose class index is out of range, if any
        if inputs.index is not None:
            # Negative indices are large as unsigned numbers: one pass finds every unusual one.
            self._labels = inputs.index.numpy().view(np.uint64)
            if self._labels.size and self._labels.max() > self.values.shape[1]:
                self._ignoring = inputs.index
                above = (inputs.index > self.values.shape[1]).unsqueeze(1)
                self._above = above if above.any() else None

    def read(self, block: Block) -> None:
        """Read a block of logits and targets."""
        self.find_valid(block)
        self.logits = block.read(self.values)
        self.target = None
        if self._dense is not None:
            self.target = block.read(self._dense, out=TARGET)
        if not (self.counted and self.keep is None) and not self._surely_sound():
            self._replace_unsound()
        if self._labels is not None:
            self._find_foreground(self._labels)

    def positives(self) -> float:
        """Return the sum of the targets over the valid entries of the last block, in float32."""
        shape = self.block.shape
        if self.target is not None:
            target = self.target.view(shape)
            return float((target if self.keep is None else target * self.keep).sum())
        places = np.divmod(self.foreground, shape[1])
        return float(
            self.foreground.size if self.keep is None else self._kept().numpy()[places].sum()
        )

    def probabilities(self, out: Tensor, *, right: bool = False) -> Tensor:
        """Return `sigmoid(u)` in `out`, or `sigmoid(-u)`; with dense targets `u` is `x`."""
        u, foreground = self.logits, torch.from_numpy(self._u)
        if right:
            u, foreground = torch.neg(u, out=out), -foreground
        torch.sigmoid(u, out=out)
        if self.foreground.size:
            out.numpy()[self.foreground] = torch.sigmoid(foreground).numpy()
        return out

    def cross_entropy(self, p: Tensor, working: Tensor, out: Tensor) -> Tensor:
        """Return the cross entropy of every entry in `out`; `working` may be the memory of `p`."""
        log_complement(p, working, out)
        torch.clamp(self.logits, min=0.0, out=out)
        if self.target is not None:
            out.addcmul_(self.logits, self.target, value=-1.0)
        elif self.foreground.size:
            out.numpy()[self.foreground] = np.maximum(self._u, 0.0)
        return out.sub_(working)

    def _surely_sound(self) -> bool:
        if self._above is not None or not surely_finite(self.logits):
            return False
        # As unsigned integers, the bits of [0, 1] are at most those of 1; all others are larger.
        return self.target is None or bool(self.target.numpy().view(np.uint32).max() <= BITS_OF_ONE)

    def _replace_unsound(self) -> None:
        """Set `unsound`, and replace unsound and ignored entries by 0."""
        sound = torch.isfinite(self.logits)
        if self.target is not None:
            sound &= (self.target >= 0) & (self.target <= 1)
        sound = sound.view(self.block.shape)
        if self._above is not None:
            sound = sound & ~self._above[self.block.rows]
        sound = self.find_unsound(sound).reshape(-1)
        self.logits = torch.where(sound, self.logits, 0.0)
        if self.target is not None:
            self.target = torch.where(sound, self.target, 0.0)

    def _find_foreground(self, labels: NDArray[np.uint64]) -> None:
        rows, flat, classes = self.block.rows, self.block.flat, self.values.shape[1]
        if not (self._window.start <= rows.start and rows.stop <= self._window.stop):
            self._window = slice(rows.start, max(rows.stop, rows.start + WINDOW))
            row = np.flatnonzero(labels[self._window] < classes)
            column = labels[self._window][row].view(np.int64)
            self._positions = (row + rows.start) * classes + column
        first, last = self._positions.searchsorted((flat.start, flat.stop))
        self.foreground = self._positions[first:last] - flat.start
        self._u = -self.logits.numpy()[self.foreground]


def log_complement(p: Tensor, working: Tensor, out: Tensor) -> None:
    """Compute `log(1 - min(p, 1 - p))` in `working`, so that `softplus(u) = max(u, 0) - working`.

    Where `1 - p` loses digits the loss is more than log 2, and they do not matter.

    Args:
        p: `sigmoid(u)`.
        working: Receives the result; may be the memory of `p`.
        out: Overwritten.
    """
    torch.sub(p, ONE, out=out)
    torch.neg(p, out=working)
    torch.maximum(working, out, out=working).log1p_()
