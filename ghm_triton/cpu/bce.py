"""Binary cross entropy: counting, and the weighted loss with its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu.blocks import LOSS, SLOPE, WEIGHT, supports
from ghm_triton.cpu.classification import ClassificationLoss
from ghm_triton.reference.interface import ClassificationInputs, RegionCounts


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
