"""Peers of the harmonized losses, written from their descriptions.

Each takes predictions `[R, C]` and dense targets `[R, C]`. Those with one-hot in their name take
class indices int64 `[R]` (`C` is background) and make dense targets of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot


class ReleasedGHMC:
    """GHM-C as released: dense targets, one pass and one device synchronisation per bin.

    Class indices are expanded to dense targets and label weights, as in MMDetection.
    """

    def __init__(self, bins: int = 30, momentum: float = 0.75) -> None:
        self.bins = bins
        self.momentum = momentum
        self.edges = [j / bins for j in range(bins)] + [1 + 1e-6]
        self.average: Tensor | None = None

    def __call__(
        self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None
    ) -> Tensor:
        """Compute the loss of logits `[R, C]` and targets `[R, C]` or class indices `[R]`.

        `label_weight`, of the shape of the targets, ignores entries where it is 0.
        """
        if label_weight is None:
            label_weight = torch.ones_like(target)
        if target.dim() == 1:
            target, label_weight = expand_labels(target, label_weight, logits.shape[1])
        target, label_weight = target.float(), label_weight.float()
        norm = (logits.sigmoid().detach() - target).abs()
        valid = label_weight > 0
        total = max(valid.float().sum().item(), 1.0)
        weights = self.weigh(norm, valid, total, logits.dtype)
        loss = binary_cross_entropy_with_logits(logits, target, reduction="none")
        return (loss * weights).sum() / total

    def weigh(self, norm: Tensor, valid: Tensor, total: float, dtype: torch.dtype) -> Tensor:
        """Compute `total / count / n` of every entry, bin by bin."""
        if self.average is None:
            self.average = torch.zeros(self.bins, device=norm.device)
        weights = torch.zeros_like(norm, dtype=dtype)
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

    def __call__(self, pred: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Compute the loss of predictions and targets of equal shape."""
        if label_weight is None:
            label_weight = torch.ones_like(target)
        d = pred - target
        loss = torch.sqrt(d * d + self.mu * self.mu) - self.mu
        norm = (d / torch.sqrt(self.mu * self.mu + d * d)).abs().detach()
        total = max(label_weight.float().sum().item(), 1.0)
        return (loss * self.weigh(norm, label_weight > 0, total, norm.dtype)).sum() / total


def expand_labels(labels: Tensor, label_weight: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Expand class indices `[R]` to dense targets and weights `[R, C]`, as MMDetection does."""
    dense = torch.zeros(len(labels), classes, dtype=labels.dtype, device=labels.device)
    foreground = torch.nonzero((labels >= 0) & (labels < classes)).squeeze(1)
    dense[foreground, labels[foreground]] = 1
    return dense, label_weight[:, None].expand(-1, classes)


def bce(logits: Tensor, target: Tensor) -> Tensor:
    """Plain binary cross entropy with dense targets in the logits' dtype."""
    return binary_cross_entropy_with_logits(logits, target)


def one_hot_bce(logits: Tensor, target: Tensor) -> Tensor:
    """Plain binary cross entropy of class indices."""
    return binary_cross_entropy_with_logits(logits, dense_targets(logits, target))


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss as torchvision's users write it, summed and divided by the positives."""
    return focal_entries(logits, target).sum() / target.sum().clamp(min=1)


def one_hot_focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss of class indices."""
    return focal(logits, dense_targets(logits, target))


def dense_targets(logits: Tensor, index: Tensor) -> Tensor:
    """One-hot `[R, C]` in the logits' dtype, without the column of the background."""
    classes = logits.shape[-1]
    return one_hot(index, classes + 1)[..., :classes].to(logits.dtype)


def focal_formula(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss of every entry, alpha 0.25 and gamma 2, as published."""
    p = torch.sigmoid(logits)
    cross_entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = 0.25 * targets + 0.75 * (1 - targets)
    return alpha_t * cross_entropy * (1 - p_t) ** 2


# torchvision's implementation if installed; the results record which was used.
FOCAL = "focal formula"
focal_entries: Callable[[Tensor, Tensor], Tensor] = focal_formula
if importlib.util.find_spec("torchvision") is not None:
    from torchvision.ops import sigmoid_focal_loss

    FOCAL, focal_entries = "focal torchvision", sigmoid_focal_loss
