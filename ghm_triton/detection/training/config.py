"""The options of a training run; flags, defaults, help and checks come from the fields here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from ghm_triton.options import (
    FRACTION,
    POSITIVE,
    WEIGHT,
    Check,
    Rule,
    at_least,
    check_options,
    option,
    require,
)

CLS_LOSSES = ("ghm", "focal", "ce", "ghm-softmax")
IOU_LOSSES = ("iou", "giou")
REG_LOSSES = ("ghm", "sl1", "asl1", *IOU_LOSSES)
MINING = ("none", "ohem", "s-ohem")
ADVERSARIES = ("none", "asdn", "astn", "asdn+astn")
OPTIMIZERS = ("adamw", "sgd")
AMP = ("none", "bf16", "fp16")
# The released RetinaNet configuration's. Faster R-CNN scales its deltas by 10 and 5 instead.
GHM_R_WEIGHT = {"retinanet": 10.0, "faster-rcnn": 1.0}

_GUIDED_ZERO = (
    "{name} must be positive with guided_loss, which scales one loss to the other; got {{{name}}}."
    " Without guided_loss it may be 0"
)
RULES = (
    Rule(lambda o: o.guides() and o.cls_weight == 0, _GUIDED_ZERO.format(name="cls_weight")),
    Rule(lambda o: o.guides() and o.reg_weight == 0, _GUIDED_ZERO.format(name="reg_weight")),
)


def _prior(init: str) -> float | None:
    """The number that `init` names; None for `prior` and `optimal`, NaN for anything else."""
    if init in ("prior", "optimal"):
        return None
    kind, _, number = init.partition("=")
    try:
        value = float(number) if kind == "prior" else math.nan
    except ValueError:
        return math.nan
    return value if 0.0 < value < 1.0 else math.nan


INIT = Check(
    "be optimal, or prior=P with P in (0, 1);", lambda init: not math.isnan(_prior(init) or 0.5)
)


@dataclass(frozen=True)
class TrainOptions:
    """The options of one run, stored in its checkpoints; each is documented by its help text.

    Raises:
        ValueError: A value is out of range.
    """

    data: str = option(
        "digits", "data set: digits (no download), voc:FOLDER or coco:FOLDER", group="data"
    )
    train_split: str = option("train", "split to train on", group="data")
    val_split: str = option("val", "held-out split that thresholds are derived from", group="data")
    on_damage: str = option(
        "skip",
        "damaged annotations: skip and report them, or refuse to start",
        group="data",
        choices=("skip", "refuse"),
    )
    hflip: float = option(
        0.0, "probability of mirroring an image left to right", group="data", check=FRACTION
    )
    vflip: float = option(
        0.0, "probability of mirroring an image upside down", group="data", check=FRACTION
    )
    workers: int = option(0, "processes that load images; 0: this one", group="data")
    init: str = option(
        "prior",
        "initial foreground probability: prior=P is the same as --prior P; optimal is the share of"
        " positives (of faster-rcnn, among the anchors of its proposals), counted before training",
        group="detector",
        check=INIT,
        metavar="prior=P|optimal",
        shown="",
    )
    cls_loss: str = option(
        "ghm",
        "classification loss: GHM-C, focal loss or cross entropy; ce and ghm-softmax make"
        " faster-rcnn a softmax detector, the others sigmoids",
        group="losses",
        choices=CLS_LOSSES,
    )
    reg_loss: str = option(
        "ghm",
        "regression loss: GHM-R, smooth L1 (delta 1/9) or authentic smooth L1 (mu 0.02) of deltas;"
        " iou and giou, of whole boxes, are for retinanet and are all that fcos has",
        group="losses",
        choices=REG_LOSSES,
        shown="ghm; of fcos giou",
    )
    mining: str = option(
        "none",
        "train on hard examples only: anchors, points, or the regions of faster-rcnn, where a"
        " region that overlaps one of a larger loss is left out; it suits ce",
        group="losses",
        choices=MINING,
    )
    mining_keep: int = option(
        64,
        "anchors, points or regions per image that mining keeps",
        group="losses",
        check=at_least(1),
    )
    guided_loss: bool | None = option(
        None,
        "scale the classification loss to the regression loss (arXiv 1909.04868); of faster-rcnn,"
        " that of its regions",
        group="losses",
        shown="with ghm where nothing is mined",
    )
    sampling: bool = option(
        True,
        "whether faster-rcnn is trained on samples of its anchors and regions, or on all of them"
        " with both stages guided",
        group="losses",
        shown="sampled",
    )
    strength: float = option(
        0.25, "strength of GHM-C, 0 (CE) to 1 (paper)", group="losses", check=FRACTION
    )
    strength_end: float | None = option(
        None,
        "strength of GHM-C at the last step",
        group="losses",
        check=FRACTION,
        shown="constant",
    )
    reg_strength: float = option(0.25, "strength of GHM-R", group="losses", check=FRACTION)
    reg_strength_end: float | None = option(
        None,
        "strength of GHM-R after --steps batches with boxes, which are all that its schedule"
        " counts",
        group="losses",
        check=FRACTION,
        shown="constant",
    )
    bins: int = option(30, "unit regions of GHM-C", group="losses")
    average: str = option(
        "positives",
        "divisor of GHM-C and CE; mined losses are divided by the examples kept",
        group="losses",
        choices=("positives", "valid"),
    )
    cls_weight: float = option(
        1.0,
        "factor of the classification loss; of guided losses, the balance of both",
        group="losses",
        check=WEIGHT,
    )
    reg_weight: float | None = option(
        None,
        "factor of the regression loss; of guided losses it multiplies both, since the"
        " classification is scaled along with it: balance those by --cls-weight",
        group="losses",
        check=WEIGHT,
        shown="1; 10 for ghm in retinanet",
    )
    adversarial: str = option(
        "none",
        "adversary of faster-rcnn's regions (A-Fast-RCNN): hides (asdn) or turns (astn) features",
        group="adversary",
        choices=ADVERSARIES,
    )
    adversarial_start: float = option(
        0.25,
        "share of the steps before the adversary takes part; asdn is trained meanwhile",
        group="adversary",
        check=FRACTION,
    )
    steps: int = option(1000, "optimiser steps", group="optimiser", check=at_least(1))
    batch_size: int = option(
        16, "images per step, over all processes", group="optimiser", check=at_least(1)
    )
    optimizer: str = option(
        "adamw", "optimiser; sgd has momentum 0.9", group="optimiser", choices=OPTIMIZERS
    )
    lr: float = option(
        3e-3,
        "peak learning rate; linear warm-up, then a cosine to zero",
        group="optimiser",
        check=POSITIVE,
    )
    warmup: int = option(50, "steps of warm-up", group="optimiser")
    weight_decay: float = option(1e-4, "weight decay, decoupled for adamw", group="optimiser")
    clip: float = option(35.0, "largest norm of the gradient", group="optimiser", check=POSITIVE)
    amp: str = option("none", "automatic mixed precision", group="optimiser", choices=AMP)
    seed: int = option(0, "seed of weights, batches and augmentation", group="optimiser")
    checkpoint_every: int = option(
        200, "steps between checkpoints", group="optimiser", check=at_least(1)
    )

    def __post_init__(self) -> None:
        check_options(self)
        require(RULES, self)

    def chosen_prior(self) -> float | None:
        """The prior that `init` names, if it names a number."""
        return _prior(self.init)

    def guides(self) -> bool:
        """Whether the losses are guided.

        By default they are where GHM-C is the loss and nothing is mined: harmonizing multiplies
        the gradient of the classification, which unguided would outweigh that of the boxes.
        """
        if self.guided_loss is not None:
            return self.guided_loss
        return self.cls_loss == "ghm" and self.mining == "none"

    def settled(self, architecture: str) -> Self:
        """These options, with those left open (None) filled in for a detector."""
        weight = self.reg_weight
        if weight is None:
            weight = GHM_R_WEIGHT[architecture] if self.reg_loss == "ghm" else 1.0
        return replace(self, guided_loss=self.guides(), reg_weight=weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; other keys are ignored."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def of_run(cls, training: dict[str, Any]) -> Self:
        """The options that a checkpoint was trained with; the first ones had no guided loss."""
        return cls.from_dict({"guided_loss": False, **training})

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
