"""How a detector is trained: every choice in one place, each with its default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchvision.ops import generalized_box_iou_loss

from ghm_triton.detection.heads import HeadLosses
from ghm_triton.functional import DEFAULT_STRENGTH
from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss
from ghm_triton.schedule import StrengthSchedule, require_strength

CLS_LOSSES = ("ghm", "focal", "ce")
REG_LOSSES = ("ghm", "sl1", "giou")
# What a detector regresses: deltas to anchors and regions, or whole boxes from points.
DETECTOR_REG_LOSSES = {
    "retinanet": ("ghm", "sl1"),
    "fcos": ("giou",),
    "faster-rcnn": ("ghm", "sl1"),
}
OPTIMIZERS = ("adamw", "sgd")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SMOOTH_L1_DELTA = 1 / 9
# The released RetinaNet configuration's. Faster R-CNN scales its deltas by 10 and 5 instead.
GHM_R_WEIGHT = {"retinanet": 10.0, "faster-rcnn": 1.0}


@dataclass(frozen=True)
class TrainOptions:
    """The options of one run; all of them are stored in its checkpoints.

    Attributes:
        data: A data set as `ghm_triton.detection.data.open_dataset` takes it.
        train_split: Split to learn from.
        val_split: Held-out split that thresholds are derived from.
        on_damage: `skip` damaged annotations (and report them), or `refuse` to start.
        steps: Optimiser steps.
        batch_size: Images a step, over all processes.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        lr: Peak learning rate; linear warm-up, then a cosine to zero.
        warmup: Steps of warm-up.
        weight_decay: Decoupled for AdamW.
        clip: Largest norm of the gradient.
        cls_loss: `ghm`, `focal` or `ce`.
        reg_loss: `ghm` or `sl1` (smooth L1, delta 1/9) of deltas; FCOS: `giou` of boxes.
        cls_weight: Multiplies the classification loss.
        reg_weight: Multiplies the regression loss; None: 10 for `ghm` in RetinaNet (as the
            released configuration), else 1.
        bins: Unit regions of GHM-C.
        average: What GHM-C and CE divide by: `positives` or `valid`.
        strength: Strength of GHM-C at the first step, in [0, 1].
        strength_end: Strength of GHM-C at the last step; None keeps it constant.
        reg_strength: Strength of GHM-R at the first step.
        reg_strength_end: Strength of GHM-R at the last step; None keeps it constant.
        hflip: Probability of mirroring an image left to right.
        vflip: Probability of mirroring it upside down.
        amp: `none`, `bf16` or `fp16` autocast.
        seed: Of weights, batches and augmentation.
        workers: Processes that load images.
        checkpoint_every: Steps between checkpoints.
    """

    data: str = "digits"
    train_split: str = "train"
    val_split: str = "val"
    on_damage: str = "skip"
    steps: int = 1000
    batch_size: int = 16
    optimizer: str = "adamw"
    lr: float = 3e-3
    warmup: int = 50
    weight_decay: float = 1e-4
    clip: float = 35.0
    cls_loss: str = "ghm"
    reg_loss: str = "ghm"
    cls_weight: float = 1.0
    reg_weight: float | None = None
    bins: int = 30
    average: str = "positives"
    strength: float = DEFAULT_STRENGTH
    strength_end: float | None = None
    reg_strength: float = DEFAULT_STRENGTH
    reg_strength_end: float | None = None
    hflip: float = 0.0
    vflip: float = 0.0
    amp: str = "none"
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        choices = {
            "cls_loss": CLS_LOSSES,
            "reg_loss": REG_LOSSES,
            "optimizer": OPTIMIZERS,
            "amp": tuple(AMP),
            "on_damage": ("skip", "refuse"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("hflip", "vflip", "strength", "reg_strength"):
            require_strength(getattr(self, name), name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; keys of other things are passed over."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))


class SmoothL1(nn.Module):
    """Smooth L1 as RetinaNet trains with: summed over coordinates, divided by boxes."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """`[P, 4]` and `[P, 4]` to a scalar; 0 for no boxes."""
        total = nn.functional.smooth_l1_loss(pred, target, beta=SMOOTH_L1_DELTA, reduction="sum")
        return total / max(1, len(pred))


class GeneralizedIoU(nn.Module):
    """Generalised IoU loss as FCOS trains with: divided by boxes."""

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Boxes `[P, 4]` and `[P, 4]`, x1 y1 x2 y2, to a scalar; 0 for no boxes."""
        total: Tensor = generalized_box_iou_loss(pred, target, reduction="sum")
        return total / max(1, len(pred))


class SoftmaxCrossEntropy(nn.Module):
    """Cross entropy of a softmax with background as its first class, as Faster R-CNN trains."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits `[R, 1 + C]` and labels int64 `[R]` (`C` background, -1 ignored) to a scalar."""
        classes = logits.shape[1]
        target = torch.where(labels < 0, -1, (labels + 1) % classes)
        total = nn.functional.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
        return total / (labels >= 0).sum().clamp(min=1)


class Weighted(nn.Module):
    """A loss times a constant."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, *arguments: Tensor) -> Tensor:
        """What the loss returns, times the weight."""
        result: Tensor = self.weight * self.loss(*arguments)
        return result


def build_losses(
    options: TrainOptions,
    group: ProcessGroup | None = None,
    *,
    architecture: str = "retinanet",
    classifier: str = "sigmoid",
) -> HeadLosses:
    """The head's losses as the options name them.

    Args:
        options: Of the run.
        group: Processes that share one gradient density.
        architecture: The detector's, as its configuration names it.
        classifier: The detector's, likewise.

    Raises:
        ValueError: The detector cannot learn by a loss that the options name.
    """
    fitting = DETECTOR_REG_LOSSES[architecture]
    if options.reg_loss not in fitting:
        reason = (
            "learns whole boxes, and GHM-R and smooth L1 are losses of single coordinates"
            if "giou" in fitting
            else "learns single coordinates, and giou is a loss of whole boxes"
        )
        raise ValueError(
            f"reg_loss must be {' or '.join(fitting)} for {architecture}, which {reason};"
            f" got {options.reg_loss!r}"
        )
    if classifier == "softmax" and options.cls_loss != "ce":
        raise ValueError(
            "a softmax classifier learns by cls_loss ce; ghm and focal are losses of sigmoids,"
            f" got {options.cls_loss!r}"
        )
    weight = options.reg_weight
    if weight is None:
        weight = GHM_R_WEIGHT[architecture] if options.reg_loss == "ghm" else 1.0
    return HeadLosses(
        Weighted(_classification(options, group, classifier), options.cls_weight),
        Weighted(_regression(options, group), weight),
    )


def _classification(
    options: TrainOptions, group: ProcessGroup | None, classifier: str
) -> nn.Module:
    if classifier == "softmax":
        return SoftmaxCrossEntropy()
    if options.cls_loss == "focal":
        return FocalLoss()
    strength = _strength(options.strength, options.strength_end, options.steps)
    return GHMCLoss(
        bins=options.bins,
        strength=strength if options.cls_loss == "ghm" else 0.0,
        average=options.average,  # type: ignore[arg-type]
        process_group=group,
    )


def _regression(options: TrainOptions, group: ProcessGroup | None) -> nn.Module:
    if options.reg_loss == "giou":
        return GeneralizedIoU()
    if options.reg_loss == "sl1":
        return SmoothL1()
    strength = _strength(options.reg_strength, options.reg_strength_end, options.steps)
    return GHMRLoss(strength=strength, process_group=group)


def _strength(start: float, end: float | None, steps: int) -> float | StrengthSchedule:
    return start if end is None or end == start else StrengthSchedule(start, end, steps)


def build_optimizer(options: TrainOptions, module: nn.Module) -> torch.optim.Optimizer:
    """The optimiser; biases and norms are not decayed."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    free = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.lr)
