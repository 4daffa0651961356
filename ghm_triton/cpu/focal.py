"""Sigmoid focal loss and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu.blocks import LOSS, MORE, SLOPE, WEIGHT, supports
from ghm_triton.cpu.classification import ClassificationLoss, log_complement
from ghm_triton.reference.interface import ClassificationInputs


def weighted_focal(
    inputs: ClassificationInputs,
    scale: Tensor,
    *,
    alpha: float,
    gamma: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `reference.weighted_focal`, in blocks where they are supported; differentiable once."""
    if not supports(inputs, scale):
        options = {"weighted": weighted, "reduce": reduce}
        return reference.weighted_focal(inputs, scale, alpha=alpha, gamma=gamma, **options)
    return Focal(inputs, scale, alpha, gamma, weighted=weighted)(inputs.logits, reduce)


class Focal(ClassificationLoss):
    """The arithmetic of `weighted_focal`."""

    def __init__(
        self,
        inputs: ClassificationInputs,
        scale: Tensor,
        alpha: float,
        gamma: float,
        *,
        weighted: bool,
    ) -> None:
        super().__init__(inputs, scale.view(1), weighted=weighted)
        self._positive, self._negative = alpha * float(scale), (1 - alpha) * float(scale)
        self._gamma = gamma

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
