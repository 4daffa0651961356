"""Softmax cross entropy: counting, and the weighted loss with its gradient; one entry per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu.blocks import SLOPE, Block, block_entries, buffer, supports
from ghm_triton.cpu.loss import BlockLoss, surely_finite
from ghm_triton.reference.interface import RegionCounts, SoftmaxInputs


def count_softmax(inputs: SoftmaxInputs, bins: int) -> RegionCounts:
    """As `reference.count_softmax`, in blocks of whole rows where they are supported."""
    if not supports(inputs) or inputs.logits.shape[1] > block_entries():
        return reference.count_softmax(inputs, bins)
    return Softmax(inputs).count(bins)


def weighted_softmax(
    inputs: SoftmaxInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `reference.weighted_softmax`, in blocks of whole rows; as `weighted_bce` then."""
    if not supports(inputs, table, scale) or inputs.logits.shape[1] > block_entries():
        return reference.weighted_softmax(inputs, table, scale, weighted=weighted, reduce=reduce)
    return Softmax(inputs, table * scale, weighted=weighted)(inputs.logits, reduce)


class Softmax(BlockLoss):
    """The arithmetic of `weighted_softmax`."""

    PER_ROW = True

    def __init__(
        self, inputs: SoftmaxInputs, weights: Tensor | None = None, *, weighted: bool = False
    ) -> None:
        super().__init__(inputs, weights, weighted=weighted)
        self._ignoring = inputs.index if bool((inputs.index < 0).any()) else None
        self._index = inputs.index.unsqueeze(1)
        self._above = bool((inputs.index >= self.values.shape[1]).any())

    def read(self, block: Block) -> None:
        """Read whole rows, and compute the probabilities of the other classes."""
        self.find_valid(Block(block.rows, slice(0, 1), block.rows))
        self._logits = block.read(self.values).view(block.shape)
        index = self._index[block.rows]
        self._column = index.clamp(0, block.shape[1] - 1)
        if self._above or not surely_finite(self._logits):
            sound = torch.isfinite(self._logits).all(dim=1, keepdim=True)
            sound = self.find_unsound(sound & (index < block.shape[1]))
            self._logits = torch.where(sound, self._logits, 0.0)
        p = torch.softmax(self._logits, dim=1, out=buffer(SLOPE, block.entries).view(block.shape))
        self._own = p.gather(1, self._column)
        self._others = p.scatter_(1, self._column, 0.0)

    def norms(self) -> Tensor:
        """Return `1 - p_y`, the sum of the other classes, which does not cancel."""
        return self._others.sum(dim=1).clamp_(max=1.0)

    def evaluate(self, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return `-log p_y`, weighted by unit region."""
        norm = self.norms()
        loss = self._losses(norm, self._own.squeeze(1))
        weight = self.weigh(norm)
        if gradient is not None:
            slope = self._others.scatter_(1, self._column, -norm.unsqueeze(1))
            weights = (weight if factor is None else weight * factor).unsqueeze(1)
            gradient.copy_(slope.mul_(weights).view(-1))
        return loss.mul_(weight)

    def _losses(self, norm: Tensor, own: Tensor) -> Tensor:
        """Return `-log p_y`; small and large losses keep their digits."""
        small = torch.log1p(norm / own)  # log(1 + others / own)
        # The largest probability is 1 / sum(exp(x - max(x))).
        distance = self._logits.amax(dim=1) - self._logits.gather(1, self._column).squeeze(1)
        large = distance - torch.log(torch.maximum(self._others.amax(dim=1), own))
        return torch.where(norm <= own, small, large)
