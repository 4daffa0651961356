"""A loss and its gradient in one walk over the blocks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghm_triton.cpu.blocks import (
    Block,
    Inputs,
    RegionCounter,
    RegionTable,
    blocks,
    buffer,
    holds_numbers,
)
from ghm_triton.reference.interface import RegionCounts

# Whether this backward pass retains the graph. Where torch cannot tell: always.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class BlockLoss(ABC):
    """A loss that is counted and evaluated one block after another.

    Args:
        inputs: Predictions and targets.
        weights: float32 `[M]`, the weight of each unit region times the scale of the loss; None to
            count.
        weighted: Whether `label_weight` multiplies the losses, or only selects entries.

    Attributes:
        block: The last block, of entries: `[h, w]`, or `[h, 1]` with an entry per row.
        keep: 1 for its valid entries and 0 for the others, float32 `[h, w]` or `[h, 1]`; None if
            all are valid.
        unsound: Its valid entries that are not finite or whose target is out of range, bool; None
            if there are none.
        foreground: Positions of the entries whose derivative changes its sign.
    """

    PER_ROW = False  # whether an entry of the loss is a row of the predictions
    block: Block
    keep: Tensor | None
    unsound: Tensor | None
    foreground: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    _ignoring: Tensor | None = None  # class indices, if any of them is negative

    def __init__(
        self, inputs: Inputs, weights: Tensor | None = None, *, weighted: bool = False
    ) -> None:
        self.tensors = [value for value in vars(inputs).values() if isinstance(value, Tensor)]
        self.values = self.tensors[0].detach()
        # NaN once an invalid entry was counted: the loss and its gradient are NaN throughout.
        self.poisoned = False
        if weights is not None:
            numbers = weights.numpy()
            self.poisoned = bool(np.isnan(numbers).any())
            self._table = RegionTable(numbers)
        self._weighted = weighted
        self._weight = inputs.weight
        if self._weight is not None:
            weight = self._weight.unsqueeze(1) if self.PER_ROW else self._weight
            self._weight = weight[:, :1] if weight.stride(1) == 0 else weight

    @abstractmethod
    def read(self, block: Block) -> None:
        """Read a block; calls `find_valid`, and replaces unsound entries by 0."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Return the gradient norms of the last block, in memory that may be overwritten."""

    @abstractmethod
    def evaluate(self, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return the losses of the last block, possibly in a buffer.

        Args:
            gradient: `[n]`, set to the gradient; None: no gradient is needed.
            factor: Multiplies the gradient, a scalar or one number per loss; None: 1.
        """

    def positives(self) -> float:
        """Return the sum of the targets over the valid entries of the last block."""
        return float(self.block.entries if self.keep is None else self._kept().sum())

    def count(self, bins: int) -> RegionCounts:
        """Count the gradient norms of the valid entries."""
        counter = RegionCounter(bins)
        positives, invalid = [0.0], 0
        for block in blocks(*self.values.shape):
            self.read(block)
            positives.append(self.positives())
            keep = self.keep
            if self.unsound is not None:
                invalid += int(self.unsound.sum())
                keep = self._kept() * ~self.unsound
            counter.add(self.norms(), keep)
        sums = torch.from_numpy(np.array(positives)), torch.from_numpy(np.array(invalid))
        return RegionCounts(counter.regions(), *sums)

    def __call__(self, predictions: Tensor, reduce: bool) -> Tensor:
        """Return the sum of the losses, or each; float32, differentiable in the predictions.

        The gradient is computed in the forward pass and kept in the dtype of the predictions; the
        backward pass multiplies it by the upstream gradient. Not in float16, where a gradient that
        no loss scale has multiplied yet underflows: it is computed in the backward pass.

        Raises:
            RuntimeError: In a backward pass through the gradient.
        """
        if torch.is_grad_enabled() and predictions.requires_grad:
            return _Blockwise.apply(predictions, self, reduce)  # type: ignore[no-any-return]
        return self.run(None, reduce)

    def run(self, gradient: Tensor | None, reduce: bool, upstream: Tensor | None = None) -> Tensor:
        """Return the losses; set the gradient, times the upstream gradient, unless it is None."""
        shape = self.values.shape[:1] if self.PER_ROW else self.values.shape
        losses = None if reduce else torch.full(shape, math.nan, dtype=torch.float32, device="cpu")
        total = math.nan if self.poisoned else 0.0  # in float64, over float32 sums of blocks
        if self.poisoned and gradient is not None:
            gradient.fill_(math.nan)
        for block in () if self.poisoned else blocks(*self.values.shape):
            self.read(block)
            part = None if gradient is None else block.flatten(gradient)
            factor = upstream
            if upstream is not None and upstream.dim():
                factor = self.block.cut(upstream.view(len(upstream), -1)).reshape(-1)
            loss = self.evaluate(part, factor)
            if losses is None:
                total += float(loss.sum())
            else:
                losses.view(-1)[self.block.flat] = loss
        return (
            torch.full((), total, dtype=torch.float32, device="cpu") if losses is None else losses
        )

    def find_valid(self, block: Block) -> None:
        """Set `keep` for a block of entries."""
        self.block = block
        self.keep = self.unsound = None
        if self._weight is not None:
            # Written as float32: a bool costs several times as much to make and to multiply by.
            weight = block.cut(self._weight)
            self.keep = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
            torch.gt(weight, 0, out=self.keep)
        if self._ignoring is not None:
            rows = (self._ignoring[block.rows] >= 0).to(torch.float32).unsqueeze(1)
            self.keep = rows if self.keep is None else self.keep * rows

    def find_unsound(self, sound: Tensor) -> Tensor:
        """Set `unsound` from the sound entries `[h, w]`; return which are valid and sound."""
        valid = self._kept() > 0
        self.unsound = valid & ~sound
        return valid & sound

    def weigh(self, norm: Tensor) -> Tensor:
        """Return the weights of entries with these gradient norms in the buffer `WEIGHT`."""
        return self.gate(self._table.look_up(norm))

    def gate(self, weights: Tensor) -> Tensor:
        """Multiply weights by `label_weight`, 0 if ignored and NaN if unsound; in place."""
        if self.keep is None and self.unsound is None:
            return weights
        rows = weights.view(self.block.shape)
        if self.keep is not None and self._weighted and self._weight is not None:
            factor = self.block.cut(self._weight).to(torch.float32)
            rows.mul_(torch.where(self.keep > 0, factor, 0.0))
        elif self.keep is not None:
            rows.mul_(self.keep)
        if self.unsound is not None:
            rows.masked_fill_(self.unsound, math.nan)
        return weights

    def write(self, gradient: Tensor, slope: Tensor, weight: Tensor, factor: Tensor | None) -> None:
        """Set the gradient to `slope * weight * factor`, computed in float32."""
        out = gradient if gradient.dtype == torch.float32 else None
        product = torch.mul(slope, weight, out=out)
        if factor is not None:
            product.mul_(factor)
        if self.foreground.size:
            product.numpy()[self.foreground] *= -1.0
        if product is not gradient:
            gradient.copy_(product)

    def buffer(self, number: int) -> Tensor:
        """Return working memory for the entries of the last block."""
        return buffer(number, self.block.flat.stop - self.block.flat.start)

    def _kept(self) -> Tensor:
        keep = self.keep
        if keep is None:
            keep = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        return keep.expand(self.block.shape)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, predictions: Tensor, loss: BlockLoss, reduce: bool) -> Tensor:
        ctx.loss = None
        if predictions.dtype == torch.float16:
            ctx.loss = loss
            # Lets autograd report freed buffers and inputs that were modified in place.
            ctx.save_for_backward(*loss.tensors)
            return loss.run(None, reduce)
        gradient = torch.empty(predictions.shape, dtype=predictions.dtype, device="cpu")
        ctx.save_for_backward(gradient)
        return loss.run(gradient, reduce)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        if not torch.is_grad_enabled():
            return _gradient(ctx, upstream), None, None
        with torch.no_grad():
            gradient = _gradient(ctx, upstream)
        # The caller may differentiate the gradient.
        return _Once.apply(gradient.requires_grad_()), None, None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    saved, loss = ctx.saved_tensors, ctx.loss
    if loss is None:
        return _scale(saved[0], upstream)
    if not _keeps_graph():
        ctx.loss = None
    gradient = torch.empty(loss.values.shape, dtype=loss.values.dtype, device="cpu")
    loss.run(gradient, True, upstream)
    return gradient


class _Once(torch.autograd.Function):
    """The identity, which raises when it is differentiated."""

    @staticmethod
    def forward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_ctx: Any, _upstream: Tensor) -> Tensor:
        raise RuntimeError(
            "this loss in float32, float16 or bfloat16 can be differentiated once: its gradient is"
            " computed together with it. In float64 it can be differentiated any number of times."
        )


def _scale(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Scale the saved gradient by the upstream gradient, in place unless the graph is retained."""
    if upstream.dim() == 1:
        upstream = upstream.unsqueeze(1)  # one loss per row
    if _keeps_graph() or not holds_numbers(upstream):
        return (gradient * upstream).to(gradient.dtype)
    if upstream.dim() == 0 and float(upstream) == 1.0:
        return gradient
    return gradient.mul_(upstream)


def surely_finite(values: Tensor) -> bool:
    """Return whether the sum of the entries is finite, so that every entry is.

    False as well if only the sum overflows.
    """
    return math.isfinite(float(values.sum()))
