"""Building a run from its options: data, losses, detector and optimiser."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector
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
from ghm_triton.detection.models.mining import HardPlaces, HardRegions
from ghm_triton.detection.models.registry import build_detector, channels_last
from ghm_triton.detection.training.compatibility import TWO_STAGE, require_compatible
from ghm_triton.detection.training.config import IOU_LOSSES, TrainOptions
from ghm_triton.detection.training.distributed import World
from ghm_triton.detection.training.priors import start_at_prior, start_proposals
from ghm_triton.evidence import ClassStatistics
from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.imbalance.ohem import (
    OHEM,
    SAME_REGION,
    StratifiedOHEM,
    cross_entropy_of_samples,
)
from ghm_triton.imbalance.sampling_free import GuidedLoss
from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss
from ghm_triton.losses.schedule import StrengthSchedule

REPORT_EVERY = 20  # steps between waits for the device
BOX_LOSSES: dict[str, type[BoxLoss]] = {
    "sl1": SmoothL1,
    "asl1": AuthenticSmoothL1,
    "iou": IoU,
    "giou": GeneralizedIoU,
}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
Reduction = Literal["mean", "sum"]


def build_losses(
    options: TrainOptions,
    group: ProcessGroup | None = None,
    *,
    architecture: str = "retinanet",
    classifier: str = "sigmoid",
    assigner: str = "iou",
) -> HeadLosses:
    """Build the losses that the options name.

    Args:
        options: Options of the run.
        group: Processes that share one gradient density and divide by the samples of all.
        architecture: `retinanet`, `fcos` or `faster-rcnn`.
        classifier: `sigmoid` or `softmax`; the latter with `faster-rcnn` only.
        assigner: `iou` or `cleanliness`.

    Raises:
        ValueError: The detector cannot be trained with the options.
    """
    require_compatible(options, architecture, classifier, assigner)
    options = options.settled(architecture)
    two_stage = architecture == TWO_STAGE
    # Mined losses are sums, which the head divides by the number of examples kept.
    reduction: Reduction = "mean" if options.mining == "none" else "sum"
    # A guide scales the unweighted classification, and weights both losses itself.
    cls_weight = 1.0 if options.guided_loss else options.cls_weight
    harmonized: dict[str, Any] = {
        "bins": options.bins,
        "strength": _strength(options.strength, options.strength_end, options.steps),
        "process_group": group,
    }
    soft_proposals = two_stage and assigner == "cleanliness"
    average: Any = options.average
    start = round(options.adversarial_start * options.steps)
    return HeadLosses(
        Weighted(_classification(options, harmonized, reduction, classifier), cls_weight),
        _regression(options, reduction, group),
        of_boxes=options.reg_loss in IOU_LOSSES,
        mining=_mining(options, two_stage, classifier),
        guide=GuidedLoss(options.cls_weight, process_group=group) if options.guided_loss else None,
        objectness=GHMCLoss(**harmonized, average=average) if soft_proposals else None,
        adversary=None
        if options.adversarial == "none"
        else partial(Adversary, kind=options.adversarial, start=start),
        process_group=group,
        samples=options.sampling,
    )


def _classification(
    options: TrainOptions, harmonized: dict[str, Any], reduction: Reduction, classifier: str
) -> nn.Module:
    if options.cls_loss == "ghm-softmax":
        return BackgroundFirst(GHMSoftmaxLoss(**harmonized, reduction=reduction))
    group = harmonized["process_group"]
    if classifier == "softmax":
        return SoftmaxCrossEntropy(reduction, group)
    if options.cls_loss == "focal":
        return Focal(reduction, group)
    if options.cls_loss == "ce":
        harmonized = {**harmonized, "strength": 0.0}
    average: Any = options.average
    return GHMCLoss(**harmonized, average=average, reduction=reduction)


def _regression(
    options: TrainOptions, reduction: Reduction, group: ProcessGroup | None
) -> Weighted:
    weight = _box_weight(options)
    if options.reg_loss != "ghm":
        return Weighted(BOX_LOSSES[options.reg_loss](reduction, group), weight)
    strength = _strength(options.reg_strength, options.reg_strength_end, options.steps)
    loss = GHMRLoss(strength=strength, process_group=group, reduction=reduction)
    # The mean is over coordinates; the sum is divided by boxes, which have four.
    return Weighted(loss, weight / 4 if reduction == "sum" else weight)


def _mining(options: TrainOptions, two_stage: bool, classifier: str) -> nn.Module | None:
    """Build what chooses the hard examples; None trains on all.

    GHM is mined by its losses without the harmonizing weights, which depend on what is kept.
    """
    if options.mining == "none":
        return None
    overlap = SAME_REGION if two_stage else None
    choose: nn.Module = (
        OHEM(options.mining_keep, overlap)
        if options.mining == "ohem"
        else StratifiedOHEM(options.steps, options.mining_keep, iou_threshold=overlap)
    )
    harmonized = options.reg_loss == "ghm"
    boxes = BOX_LOSSES["asl1" if harmonized else options.reg_loss]()
    box_weight = _box_weight(options) / (4 if harmonized else 1)
    focal = FocalLoss(reduction="none")

    def classification(logits: Tensor, labels: Tensor) -> Tensor:
        if classifier == "softmax":
            lost = SoftmaxCrossEntropy().rows(logits, labels)
        elif options.cls_loss == "focal":
            lost = focal(logits, labels).sum(dim=-1)
        else:
            lost = cross_entropy_of_samples(logits, labels)
        return options.cls_weight * lost

    def regression(predicted: Tensor, expected: Tensor) -> Tensor:
        return box_weight * boxes.rows(predicted, expected)

    return (HardRegions if two_stage else HardPlaces)(choose, classification, regression)


def _box_weight(options: TrainOptions) -> float:
    """The weight of the regression loss, of options that are settled."""
    if options.reg_weight is None:
        raise ValueError("reg_weight is None: settle the options first")
    return options.reg_weight


def _strength(start: float, end: float | None, steps: int) -> float | StrengthSchedule:
    return start if end is None or end == start else StrengthSchedule(start, end, steps)


def build_optimizer(options: TrainOptions, module: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser; biases and norms are not decayed."""
    decayed = [p for p in module.parameters() if p.requires_grad and p.dim() > 1]
    free = [p for p in module.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.lr)


class Splits(NamedTuple):
    """The data of a run.

    Attributes:
        train: The images to train on.
        held_out: The images that thresholds are derived from.
    """

    train: DetectionDataset
    held_out: DetectionDataset


def open_split(
    options: TrainOptions, split: str, class_names: tuple[str, ...] | None = None
) -> DetectionDataset:
    """Open a split of the run's data set, by default with the classes of the data set."""
    damage: Any = options.on_damage
    return open_dataset(options.data, split, on_damage=damage, class_names=class_names)


def open_splits(options: TrainOptions, class_names: tuple[str, ...] | None = None) -> Splits:
    """Open both splits, each once, with the classes of the training split unless others are named.

    Raises:
        ValueError: The data set or a split does not exist, or is damaged.
    """
    train = open_split(options, options.train_split, class_names)
    return Splits(train, open_split(options, options.val_split, train.class_names))


def _warn_of_shared_images(splits: Splits) -> None:
    train, held_out = splits
    shared = train.sources() & held_out.sources()
    if shared:
        warnings.warn(
            f"{len(shared)} of the {len(held_out)} images of split {held_out.split!r} are trained"
            f" on too (split {train.split!r}): thresholds derived from them will be too hopeful",
            stacklevel=4,
        )


@dataclass
class Run:
    """The state of a run in this process.

    Attributes:
        options: Options of the run, settled for the detector.
        config: The detector's description.
        out: Folder of the checkpoint and the metrics.
        world: This process among those of the run.
        splits: The data.
        detector: The detector with its losses.
        optimizer: Its optimiser.
        scaler: Scales the loss of fp16.
        statistics: Counts up to the last checkpoint.
        stop: Step to stop after.
        step: Steps that are done.
        record: Scalars of the last step.
        metrics: Records of the last steps, as they were written to `metrics.jsonl`.
        step_seconds: Mean duration of a step between waits for the device.
        held_out: Average precision on the held-out images, of a finished run.
    """

    options: TrainOptions
    config: DetectorConfig
    out: Path
    world: World
    splits: Splits
    detector: Detector
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    statistics: ClassStatistics
    stop: int
    step: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    held_out: MeanAveragePrecision | None = None

    @property
    def synchronizes(self) -> bool:
        """Whether this step waits for the device, to report."""
        return self.step % REPORT_EVERY == 0 or self.step == self.stop

    @property
    def saves(self) -> bool:
        """Whether a checkpoint is written after this step."""
        return self.step % self.options.checkpoint_every == 0 or self.step == self.stop

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.options.steps


def build_run(
    options: TrainOptions,
    config: DetectorConfig,
    out: Path,
    world: World,
    *,
    splits: Splits | None = None,
    resume: bool = False,
    stop_after: int | None = None,
) -> Run:
    """Build the detector, its losses and its optimiser, seeded.

    Args:
        options: Options of the run.
        config: The detector's description.
        out: Folder of the run.
        world: This process among those of the run.
        splits: The data; opened as the options name it if None.
        resume: Whether a checkpoint will be loaded over it.
        stop_after: Stop once this many steps are done.

    Raises:
        ValueError: The data set or an option does not fit.
    """
    require_compatible(options, config.architecture, config.classifier, config.assigner)
    options = options.settled(config.architecture)
    splits = splits or open_splits(options, config.class_names)
    if world.leads:
        _warn_of_shared_images(splits)
    config = start_at_prior(options, config, splits.train, out, resume=resume)
    torch.manual_seed(options.seed)
    losses = build_losses(
        options,
        world.group,
        architecture=config.architecture,
        classifier=config.classifier,
        assigner=config.assigner,
    )
    detector = build_detector(config, losses)
    if not resume:
        start_proposals(options, detector, splits.train, out)
    channels_last(detector).to(world.device)
    return Run(
        options,
        config,
        out,
        world,
        splits,
        detector,
        optimizer=build_optimizer(options, detector),
        scaler=torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16"),
        statistics=ClassStatistics(config.class_names),
        stop=min(options.steps, options.steps if stop_after is None else stop_after),
    )
