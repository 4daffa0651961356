"""Builds what a run trains with: losses, mining, adversary and optimiser, from its options."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ghm_triton.detection.models.heads import HeadLosses
from ghm_triton.detection.models.losses import (
    AuthenticSmoothL1,
    BackgroundFirst,
    BoxLoss,
    Focal,
    GeneralizedIoU,
    IoU,
    SmoothL1,
    SoftmaxCrossEntropy,
    Weighted,
)
from ghm_triton.detection.models.mining import HardPlaces, HardRegions, Rows
from ghm_triton.detection.training.compatibility import OF_BOXES, require_fitting
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.imbalance.ohem import OHEM, SAME_REGION
from ghm_triton.imbalance.s_ohem import StratifiedOHEM
from ghm_triton.imbalance.samples import cross_entropy_of_samples
from ghm_triton.imbalance.sampling_free import GuidedLoss
from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss
from ghm_triton.losses.schedule import StrengthSchedule

BOX_LOSSES: dict[str, type[BoxLoss]] = {
    "sl1": SmoothL1,
    "asl1": AuthenticSmoothL1,
    "iou": IoU,
    "giou": GeneralizedIoU,
}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_losses(
    options: TrainOptions,
    group: ProcessGroup | None = None,
    *,
    architecture: str = "retinanet",
    classifier: str = "sigmoid",
    assigner: str = "iou",
) -> HeadLosses:
    """The head's losses as the options name them.

    Args:
        options: Of the run.
        group: Processes that share one gradient density, and divide by the samples of all.
        architecture: The detector's, as its configuration names it.
        classifier: The detector's, likewise.
        assigner: The detector's, likewise.

    Raises:
        ValueError: The detector cannot learn by a loss that the options name.
    """
    require_fitting(options, architecture, classifier, assigner)
    options = options.settled(architecture)
    guided = options.guides()
    # Guided loss is to see the classification without its weight.
    cls_weight = 1.0 if guided else options.cls_weight
    strength = _strength(options.strength, options.strength_end, options.steps)
    return HeadLosses(
        Weighted(_classification(options, group, classifier), cls_weight),
        Weighted(*_regression(options, group, options.box_weight(architecture))),
        of_boxes=options.reg_loss in OF_BOXES,
        mining=_mining(options, architecture, classifier),
        guide=GuidedLoss(options.cls_weight, process_group=group) if guided else None,
        objectness=objectness_loss(options, strength, group, architecture, assigner),
        adversary=adversary_maker(options, architecture),
        process_group=group,
        samples=options.sampling,
    )


def _mining(options: TrainOptions, architecture: str, classifier: str) -> nn.Module | None:
    """Of GHM-R without its weights, which follow from what is kept."""
    weight = options.box_weight(architecture)
    harmonized = options.reg_loss == "ghm"
    boxes = BOX_LOSSES["asl1" if harmonized else options.reg_loss]()
    scale = weight / 4 if harmonized else weight  # of boxes, as of coordinates
    return build_mining(options, boxes, scale, architecture, classifier)


def _classification(
    options: TrainOptions, group: ProcessGroup | None, classifier: str
) -> nn.Module:
    harmonized: dict[str, Any] = {
        "bins": options.bins,
        "strength": _strength(options.strength, options.strength_end, options.steps),
        "process_group": group,
    }
    reduction = _reduction(options)
    if options.cls_loss == "ghm-softmax":
        return BackgroundFirst(GHMSoftmaxLoss(**harmonized, reduction=reduction))
    if classifier == "softmax":
        return SoftmaxCrossEntropy(reduction, group)
    if options.cls_loss == "focal":
        return Focal(reduction, group)
    if options.cls_loss == "ce":
        harmonized["strength"] = 0.0
    average: Any = options.average
    return GHMCLoss(**harmonized, average=average, reduction=reduction)


def _regression(
    options: TrainOptions, group: ProcessGroup | None, weight: float
) -> tuple[nn.Module, float]:
    """The loss and its weight."""
    reduction = _reduction(options)
    if options.reg_loss != "ghm":
        return BOX_LOSSES[options.reg_loss](reduction, group), weight
    strength = _strength(options.reg_strength, options.reg_strength_end, options.steps)
    loss = GHMRLoss(strength=strength, process_group=group, reduction=reduction)
    # Its mean is one over coordinates; a sum that is to be divided by boxes has four times those.
    return loss, weight / 4 if reduction == "sum" else weight


def _reduction(options: TrainOptions) -> Literal["mean", "sum"]:
    """Mined samples are divided by their number, whatever they are."""
    return "mean" if options.mining == "none" else "sum"


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


def objectness_loss(
    options: TrainOptions,
    strength: float | StrengthSchedule,
    group: ProcessGroup | None,
    architecture: str,
    assigner: str,
) -> GHMCLoss | None:
    """GHM-C of a proposal network that learns from every anchor; None for one that samples.

    Whatever the regions' classification learns by: without sampling, balance is its to keep.
    """
    if assigner != "cleanliness" or architecture != "faster-rcnn":
        return None
    return GHMCLoss(
        bins=options.bins,
        strength=strength,
        average=options.average,  # type: ignore[arg-type]
        process_group=group,
    )


def adversary_maker(options: TrainOptions, architecture: str) -> Callable[[int], Adversary] | None:
    """What makes the adversary that the options name, given the channels of pooled features.

    Raises:
        ValueError: The detector has no regions.
    """
    if options.adversarial == "none":
        return None
    if architecture != "faster-rcnn":
        raise ValueError(
            f"adversarial must be none for {architecture}, which looks once: an adversary hides"
            f" and turns the pooled features of regions; got {options.adversarial!r}"
        )
    start = round(options.adversarial_start * options.steps)
    return partial(Adversary, kind=options.adversarial, start=start)


def build_mining(
    options: TrainOptions,
    boxes: BoxLoss,
    scale: float,
    architecture: str,
    classifier: str,
) -> nn.Module | None:
    """What chooses the samples to learn from, as the options say; None for all.

    GHM is mined by its losses without their weights, which follow from what is kept.

    Args:
        options: Of the run.
        boxes: The regression loss, as far as it is one of single boxes.
        scale: Its weight.
        architecture: The detector's, as its configuration names it.
        classifier: The detector's, likewise.
    """
    if options.mining == "none":
        return None
    regions = architecture == "faster-rcnn"
    overlap = SAME_REGION if regions else None
    choose: nn.Module = (
        OHEM(options.mining_keep, overlap)
        if options.mining == "ohem"
        else StratifiedOHEM(options.steps, options.mining_keep, iou_threshold=overlap)
    )
    plain = _rows(options.cls_loss, classifier)

    def classification(logits: Tensor, labels: Tensor) -> Tensor:
        return options.cls_weight * plain(logits, labels)

    def regression(predicted: Tensor, expected: Tensor) -> Tensor:
        return scale * boxes.rows(predicted, expected)

    return (HardRegions if regions else HardPlaces)(choose, classification, regression)


def _rows(cls_loss: str, classifier: str) -> Rows:
    if classifier == "softmax":
        return SoftmaxCrossEntropy().rows
    if cls_loss != "focal":
        return cross_entropy_of_samples
    focal = FocalLoss(reduction="none")

    def of_samples(logits: Tensor, labels: Tensor) -> Tensor:
        lost: Tensor = focal(logits, labels).sum(dim=-1)
        return lost

    return of_samples
