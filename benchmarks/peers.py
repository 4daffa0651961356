"""What the harmonized losses are measured against, written from the description of each."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot


class ReleasedGHMC:
    """GHM-C as released: one-hot targets, one pass and one wait for the device a bin."""

    def __init__(self, bins: int = 30, momentum: float = 0.75) -> None:
        self.bins = bins
        self.momentum = momentum
        self.edges = [j / bins for j in range(bins)] + [1 + 1e-6]
        self.average: Tensor | None = None

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits `[R, C]` and targets `[R, C]` or class indices `[R]`."""
        if target.dim() == 1:
            classes = logits.shape[1]
            target = one_hot(target, classes + 1)[:, :classes]
        target = target.float()
        valid = torch.ones_like(target) > 0
        norm = (logits.sigmoid().detach() - target).abs()
        total = max(valid.float().sum().item(), 1.0)
        weights = self.weigh(norm, valid, total).to(logits.dtype)
        loss = binary_cross_entropy_with_logits(
            logits, target.to(logits.dtype), weights, reduction="sum"
        )
        return loss / total

    def weigh(self, norm: Tensor, valid: Tensor, total: float) -> Tensor:
        """`total / count / n` of every entry, bin by bin."""
        if self.average is None:
            self.average = torch.zeros(self.bins, device=norm.device)
        weights = torch.zeros_like(norm)
        occupied = 0
        for j in range(self.bins):
            inside = (norm >= self.edges[j]) & (norm < self.edges[j + 1]) & valid
            count = inside.sum().item()
            if count > 0:
                moved = self.momentum * self.average[j] + (1 - self.momentum) * count
                self.average[j] = moved
                weights[inside] = total / moved
                occupied += 1
        return weights / occupied if occupied else weights


class ReleasedGHMR(ReleasedGHMC):
    """GHM-R as released."""

    def __init__(self, mu: float = 0.02, bins: int = 10, momentum: float = 0.7) -> None:
        super().__init__(bins, momentum)
        self.mu = mu
        self.edges[-1] = 1e3

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss of predictions and targets of one shape."""
        d = pred - target
        loss = torch.sqrt(d * d + self.mu * self.mu) - self.mu
        norm = (d / torch.sqrt(self.mu * self.mu + d * d)).abs().detach().float()
        valid = torch.ones_like(norm) > 0
        total = max(valid.float().sum().item(), 1.0)
        return (loss * self.weigh(norm, valid, total)).sum() / total


def one_hot_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Plain binary cross entropy; class indices cost it a one-hot matrix."""
    return binary_cross_entropy_with_logits(logits, _dense(logits, target))


def torchvision_focal(logits: Tensor, target: Tensor) -> Tensor:
    """`torchvision.ops.sigmoid_focal_loss`, summed and divided by the positives."""
    from torchvision.ops import sigmoid_focal_loss

    dense = _dense(logits, target)
    loss: Tensor = sigmoid_focal_loss(logits, dense, reduction="sum")
    return loss / dense.sum().clamp(min=1)


def _dense(logits: Tensor, target: Tensor) -> Tensor:
    if target.dim() == 1:
        classes = logits.shape[1]
        target = one_hot(target, classes + 1)[:, :classes]
    return target.to(logits.dtype)
