"""Binary cross entropy and the focal loss: counting, the losses and their gradients."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu.blocks import LOSS, MORE, SLOPE, TARGET, WEIGHT, Block, supports
from ghm_triton.cpu.loss import BlockLoss, surely_finite
from ghm_triton.reference.interface import ClassificationInputs, Focus, RegionCounts

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
                if self._labels.view(np.int64).max() > self.values.shape[1]:
                    self._above = (inputs.index > self.values.shape[1]).unsqueeze(1)

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


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `reference.count_bce`, in blocks where they are supported."""
    if not supports(inputs):
        return reference.count_bce(inputs, bins)
    return BCE(inputs).count(bins)


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `reference.weighted_bce`, in blocks where they are supported; differentiable once then.

    The table and the scale have to be NaN if a valid entry is unsound.
    """
    if not supports(inputs, table, scale):
        return reference.weighted_bce(inputs, table, scale, weighted=weighted, reduce=reduce)
    loss = BCE(inputs, table * scale, weighted=weighted)
    loss.counted = True
    return loss(inputs.logits, reduce)


class BCE(ClassificationLoss):
    """The arithmetic of `weighted_bce`."""

    def norms(self) -> Tensor:
        """Return `|sigmoid(x) - p*|`."""
        p = self.probabilities(out=self.buffer(SLOPE))
        return p if self.target is None else p.sub_(self.target).abs_()

    def evaluate(self, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return cross entropy, weighted by unit region."""
        p = slope = norm = self.probabilities(out=self.buffer(SLOPE))
        if self.target is not None:
            norm = torch.sub(p, self.target, out=self.buffer(WEIGHT)).abs_()
        weight = self.weigh(norm)
        if gradient is not None:
            if self.target is not None:
                slope = torch.sub(p, self.target, out=self.buffer(LOSS))
            self.write(gradient, slope, weight, factor)
        return self.cross_entropy(p, working=p, out=self.buffer(LOSS)).mul_(weight)


def weighted_focal(
    inputs: ClassificationInputs, scale: Tensor, focus: Focus, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `reference.weighted_focal`, in blocks where they are supported; differentiable once."""
    if not supports(inputs, scale):
        return reference.weighted_focal(inputs, scale, focus, weighted=weighted, reduce=reduce)
    return Focal(inputs, scale, focus, weighted=weighted)(inputs.logits, reduce)


class Focal(ClassificationLoss):
    """The arithmetic of `weighted_focal`."""

    def __init__(
        self, inputs: ClassificationInputs, scale: Tensor, focus: Focus, *, weighted: bool
    ) -> None:
        super().__init__(inputs, scale.view(1), weighted=weighted)
        whole = float(scale)
        self._positive, self._negative = focus.alpha * whole, (1 - focus.alpha) * whole
        self._gamma = focus.gamma

    def norms(self) -> Tensor:
        """The focal loss has no unit regions."""
        raise NotImplementedError

    def evaluate(self, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return `-alpha_t (1 - p_t)^gamma log(p_t)`."""
        p, weight, loss, slope = (self.buffer(number) for number in (SLOPE, WEIGHT, LOSS, MORE[0]))
        self.probabilities(out=p)
        if self.target is None:
            self.cross_entropy(p, working=slope, out=loss)
            weight.fill_(self._negative)
            weight.numpy()[self.foreground] = self._positive
            self._focus(p, weight, slope)
            if gradient is not None:
                self.probabilities(out=slope, right=True)
                self.write(gradient, self._slope(p, slope, loss), weight, factor)
            return loss.mul_(weight)
        # A dense target is a negative entry by 1 - p* and a positive one by p*.
        q, positive, positive_slope = (self.buffer(number) for number in MORE[1:])
        self.probabilities(out=q, right=True)
        for u, wrong, right, out, working in (
            (self.logits, p, q, loss, slope),
            (-self.logits, q, p, positive, positive_slope),
        ):
            log_complement(wrong, working, out)
            torch.clamp(u, min=0.0, out=out).sub_(working)
            if u is self.logits:
                torch.sub(self.target, 1.0, out=weight).mul_(-self._negative)
            else:
                torch.mul(self.target, self._positive, out=weight)
            self._focus(wrong, weight, working)
            self._slope(wrong, working.copy_(right), out).mul_(weight)
            out.mul_(weight)
        if gradient is not None:
            slope.sub_(positive_slope)
            gradient.copy_(slope if factor is None else slope.mul_(factor))
        return loss.add_(positive)

    def _focus(self, p: Tensor, weight: Tensor, working: Tensor) -> None:
        """Multiply the weights by `p^gamma`, where `p` is the probability of the wrong answer."""
        weight.mul_(torch.pow(p, self._gamma, out=working))
        self.gate(weight)

    def _slope(self, p: Tensor, q: Tensor, loss: Tensor) -> Tensor:
        """Return `p + gamma (1 - p) softplus(u)` in the memory of `q = 1 - p`.

        Times `p^gamma`, that is the derivative of `p^gamma softplus(u)`. Rounding `1 - p` would
        lose the digits of `q`.
        """
        return q.mul_(loss).mul_(self._gamma).add_(p)
