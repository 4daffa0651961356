"""Losses that are not harmonized, and adapters of losses to heads."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from ghm_triton.imbalance.cleanliness import paired_iou
from ghm_triton.losses import FocalLoss
from ghm_triton.losses.inputs import classification_inputs
from ghm_triton.reference.losses import positives
from ghm_triton.state import SharedState

SMOOTH_L1_DELTA = 1 / 9
ASL1_MU = 0.02


class Averaged(SharedState):
    """A loss that is divided by the samples of all ranks, as the harmonized losses are.

    Divided by the samples of each rank, boxes of a rank with few of them would weigh more, and a
    guide would scale one loss by another with a different divisor.

    Args:
        reduction: `mean` or `sum`.
        process_group: Ranks whose samples are counted together. Averaged over them (as DDP does
            with gradients), the mean is that of one rank with the whole batch; every rank must make
            the call.
    """

    def __init__(
        self, reduction: str = "mean", process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(process_group)
        self.reduction = require_reduction(reduction)

    def reduced(self, total: Tensor, samples: Tensor) -> Tensor:
        """Reduce the sum over this rank's samples, given their number."""
        if self.reduction == "sum":
            return total
        if self.process_group is None:
            return total / samples.clamp(min=1)
        counted = samples.to(torch.float64, copy=True)
        dist.all_reduce(counted, group=self.process_group)
        ranks = dist.get_world_size(self.process_group)
        return total * (ranks / counted.clamp(min=1)).to(total.dtype)


class BoxLoss(Averaged, ABC):
    """A loss of boxes: summed over the coordinates, divided by the number of boxes.

    Args:
        reduction: `mean` divides by boxes; `sum`.
        process_group: Ranks whose boxes are counted together.
    """

    @abstractmethod
    def rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss of every box, `[P]`, of predictions and targets `[P, 4]`."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The reduced loss of predictions and targets `[P, 4]`; 0 for no boxes."""
        boxes = torch.full((), len(pred), device=pred.device)
        return self.reduced(self.rows(pred, target).sum(), boxes)


class SmoothL1(BoxLoss):
    """Smooth L1 of deltas, as in RetinaNet; `delta = 1/9`."""

    def rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """`d^2 / (2 delta)` where `|d| <= delta`, else `|d| - delta / 2`; summed over deltas."""
        entries = nn.functional.smooth_l1_loss(pred, target, beta=SMOOTH_L1_DELTA, reduction="none")
        return entries.sum(dim=1)


class AuthenticSmoothL1(BoxLoss):
    """ASL1 without harmonizing, of deltas (arXiv 1811.05181, equation 11); `mu = 0.02`."""

    def rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """`sqrt(d^2 + mu^2) - mu`, summed over deltas."""
        d = pred - target
        # Avoids cancellation where d << mu.
        long = torch.hypot(d, torch.full_like(d, ASL1_MU))
        return (d * (d / (long + ASL1_MU))).sum(dim=1)


class IoU(BoxLoss):
    """IoU loss of whole boxes, `1 - IoU`; its gradient is 0 for disjoint boxes."""

    def rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """Boxes x1 y1 x2 y2 to `1 - IoU`."""
        return 1 - paired_iou(pred, target)


class GeneralizedIoU(BoxLoss):
    """Generalised IoU loss of whole boxes (arXiv 1902.09630), as in FCOS."""

    def rows(self, pred: Tensor, target: Tensor) -> Tensor:
        """Boxes x1 y1 x2 y2 to `1 - GIoU`, in [0, 2]."""
        loss: Tensor = generalized_box_iou_loss(pred, target, reduction="none")
        return loss


class Centerness(Averaged):
    """Cross entropy of the centerness of points, divided by points, as in FCOS."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Logits and targets in [0, 1], both `[P]`, to a scalar; 0 for no points."""
        total = nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return self.reduced(total, torch.full((), len(target), device=target.device))


class SoftmaxCrossEntropy(Averaged):
    """Cross entropy of a softmax with background as its first class, as in Faster R-CNN.

    Args:
        reduction: `mean` divides by the regions that are not ignored; `sum`.
        process_group: Ranks whose samples are counted together; None for this process alone.
    """

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `[R, 1 + C]` and labels int64 `[R]` to the loss of every region, `[R]`."""
        target = background_first(labels, logits.shape[1])
        return nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="none")

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `[R, 1 + C]` and labels int64 `[R]` (`C` background, -1 ignored) to a scalar."""
        return self.reduced(self.rows(logits, labels).sum(), (labels >= 0).sum())


class Focal(Averaged):
    """Focal loss of sigmoids, as in RetinaNet.

    Args:
        reduction: `mean` divides by the positives; `sum`.
        process_group: Ranks whose samples are counted together; None for this process alone.
    """

    def __init__(
        self, reduction: str = "mean", process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(reduction, process_group)
        # Without a group, the loss divides in its kernel.
        self.loss = FocalLoss(reduction="sum" if process_group or reduction == "sum" else "mean")

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The reduced loss; arguments as in `FocalLoss`."""
        loss: Tensor = self.loss(logits, target, label_weight)
        if self.process_group is None:
            return loss
        inputs = classification_inputs(logits, target, label_weight, validate=False)
        return self.reduced(loss, positives(inputs))


class BackgroundFirst(nn.Module):
    """A softmax loss whose logits have background as their first class.

    Args:
        loss: Called with logits `[R, 1 + C]` and the index of each row's class, negative ignored.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `[R, 1 + C]` and labels int64 `[R]` (`C` background, -1 ignored) to a scalar."""
        result: Tensor = self.loss(logits, background_first(labels, logits.shape[1]))
        return result


def require_reduction(reduction: str) -> str:
    """`reduction` if it is `mean` or `sum`.

    Raises:
        ValueError: It is not.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    return reduction


def background_first(labels: Tensor, outputs: int) -> Tensor:
    """Map labels whose last class is background to outputs whose first is."""
    return torch.where(labels < 0, -1, (labels + 1) % outputs)


class Weighted(nn.Module):
    """A loss times a constant."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, *arguments: Tensor) -> Tensor:
        """The loss of the arguments, times the weight."""
        result: Tensor = self.weight * self.loss(*arguments)
        return result
