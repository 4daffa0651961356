"""Authentic smooth L1: counting, and the weighted loss with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu.blocks import LOSS, MORE, SLOPE, WEIGHT, Block, supports
from ghm_triton.cpu.loss import BlockLoss, surely_finite
from ghm_triton.reference.interface import RegionCounts, RegressionInputs
from ghm_triton.reference.losses import hypotenuse, squared_width


def count_asl1(inputs: RegressionInputs, bins: int) -> RegionCounts:
    """As `reference.count_asl1`, in blocks where they are supported."""
    if not supports(inputs):
        return reference.count_asl1(inputs, bins)
    return ASL1(inputs).count(bins)


def weighted_asl1(
    inputs: RegressionInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `reference.weighted_asl1`, in blocks where they are supported; as `weighted_bce` then."""
    if not supports(inputs, table, scale):
        return reference.weighted_asl1(inputs, table, scale, weighted=weighted, reduce=reduce)
    return ASL1(inputs, table * scale, weighted=weighted)(inputs.pred, reduce)


class ASL1(BlockLoss):
    """The arithmetic of `weighted_asl1`."""

    def __init__(
        self, inputs: RegressionInputs, weights: Tensor | None = None, *, weighted: bool = False
    ) -> None:
        super().__init__(inputs, weights, weighted=weighted)
        self._target = inputs.target
        self._mu = inputs.mu

    def read(self, block: Block) -> None:
        """Compute `d = pred - target` and `sqrt(d^2 + mu^2)`."""
        self.find_valid(block)
        self._d, self._length = d, length = self.buffer(SLOPE), self.buffer(MORE[0])
        torch.sub(block.read(self.values), block.read(self._target), out=d)
        if surely_finite(torch.square(d, out=length)):
            length.add_(squared_width(self._mu)).sqrt_()
            return
        sound = self.find_unsound(torch.isfinite(d).view(block.shape)).reshape(-1)
        d.copy_(torch.where(sound, d, 0.0))
        length.copy_(hypotenuse(d, self._mu))  # finite where the square overflows

    def norms(self) -> Tensor:
        """Return `|d| / sqrt(d^2 + mu^2)`."""
        return self._d.abs_().div_(self._length)

    def evaluate(self, gradient: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return authentic smooth L1, weighted by unit region."""
        length = self._length
        slope = self._d.div_(length)
        weight = self.weigh(torch.abs(slope, out=self.buffer(WEIGHT)))
        d = torch.mul(slope, length, out=self.buffer(LOSS))
        if gradient is not None:
            self.write(gradient, slope, weight, factor)
        # d^2 / (sqrt(d^2 + mu^2) + mu), without the overflow of the square.
        return torch.div(d, length.add_(self._mu), out=length).mul_(d).mul_(weight)
