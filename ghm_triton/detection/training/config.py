"""How a detector is trained: every choice in one place, each with its default."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from ghm_triton.imbalance.adversarial import KINDS as ADVERSARIES
from ghm_triton.imbalance.ohem import KEEP
from ghm_triton.losses import DEFAULT_STRENGTH
from ghm_triton.losses.schedule import require_strength

CLS_LOSSES = ("ghm", "focal", "ce", "ghm-softmax")
REG_LOSSES = ("ghm", "sl1", "asl1", "iou", "giou")
MINING = ("none", "ohem", "s-ohem")
OPTIMIZERS = ("adamw", "sgd")
AMP = ("none", "bf16", "fp16")
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
        cls_loss: `ghm`, `focal` or `ce`; `ghm-softmax` or `ce` of a softmax classifier.
        reg_loss: `ghm`, `sl1` (smooth L1, delta 1/9) or `asl1` (authentic smooth L1, mu 0.02) of
            deltas; `iou` or `giou` of boxes: for RetinaNet, and FCOS learns by no other.
        cls_weight: Multiplies the classification loss; of guided losses it is the balance of both.
        reg_weight: Multiplies the regression loss; None: 10 for `ghm` in RetinaNet (as the
            released configuration), else 1. A guide scales the classification along with it, so
            that of guided losses it multiplies both, and leaves the balance to `cls_weight`.
        bins: Unit regions of GHM-C.
        average: What GHM-C and CE divide by: `positives` or `valid`. Mined losses are divided by
            what is kept.
        strength: Strength of GHM-C at the first step, in [0, 1].
        strength_end: Strength of GHM-C at the last step; None keeps it constant.
        reg_strength: Strength of GHM-R at the first step.
        reg_strength_end: Strength of GHM-R after `steps` batches with boxes, which are all that its
            schedule counts: with empty batches in between it is not reached by the last step.
            None keeps it constant.
        mining: What is learnt from: `none` (everything, and of a two-stage detector sampled
            regions), `ohem` or `s-ohem` (hard examples; of a two-stage detector, hard regions).
        sampling: Whether a two-stage detector learns from a sample of its anchors and of its
            regions that are not mined; False: from every one, and its proposals are guided as its
            regions are (arXiv 1909.04868).
        mining_keep: Anchors, points or regions that mining keeps, an image.
        init: What the classifier's bias starts from: `prior`, the configuration's; `prior=0.01`,
            that one; or `optimal`, counted before training (arXiv 1909.04868). Of a two-stage
            detector `optimal` is about its proposals' objectness.
        guided_loss: Scale the classification loss to the regression loss (arXiv 1909.04868); of a
            two-stage detector that samples, its regions'. None: where a detector learns by GHM-C
            and nothing is mined, because harmonizing multiplies the gradient of the
            classification, and unguided it would drown that of the boxes.
        adversarial: What makes a two-stage detector's regions harder: `none`, `asdn`, `astn` or
            `asdn+astn` (A-Fast-RCNN).
        adversarial_start: Share of the steps after which it begins to, in [0, 1].
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
    mining: str = "none"
    mining_keep: int = KEEP
    sampling: bool = True
    init: str = "prior"
    guided_loss: bool | None = None
    adversarial: str = "none"
    adversarial_start: float = 0.25
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
            "mining": MINING,
            "adversarial": ADVERSARIES,
            "optimizer": OPTIMIZERS,
            "amp": AMP,
            "on_damage": ("skip", "refuse"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        for name in ("steps", "batch_size", "checkpoint_every", "mining_keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("adversarial_start", "hflip", "vflip", "strength", "reg_strength"):
            require_strength(getattr(self, name), name)
        for name in ("cls_weight", "reg_weight"):
            self._require_weight(name)
        self.chosen_prior()

    def _require_weight(self, name: str) -> None:
        """Raise a ValueError if a loss cannot have that weight."""
        weight = getattr(self, name)
        if weight is None:
            return
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {weight}")
        if self.guides() and weight == 0:
            raise ValueError(
                f"{name} must be positive with guided_loss, which scales one loss to the other;"
                f" got {weight}. Without guided_loss it may be 0"
            )

    def chosen_prior(self) -> float | None:
        """The prior that `init` names, if it names a number.

        Raises:
            ValueError: `init` is not one of its forms.
        """
        if self.init in ("prior", "optimal"):
            return None
        kind, _, number = self.init.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if kind != "prior" or not 0.0 < value < 1.0:
            raise ValueError(
                f"init must be optimal, or prior=P with P in (0, 1); got {self.init!r}"
            )
        return value

    def guides(self) -> bool:
        """Whether the losses are guided, as asked for or by default."""
        if self.guided_loss is not None:
            return self.guided_loss
        return self.cls_loss == "ghm" and self.mining == "none"

    def box_weight(self, architecture: str) -> float:
        """Of a detector's regression loss, as asked for or by default."""
        if self.reg_weight is not None:
            return self.reg_weight
        return GHM_R_WEIGHT[architecture] if self.reg_loss == "ghm" else 1.0

    def settled(self, architecture: str) -> Self:
        """These options, with what was left open (None) filled in for a detector."""
        guided, weight = self.guides(), self.box_weight(architecture)
        return replace(self, guided_loss=guided, reg_weight=weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`; keys of other things are passed over."""
        known = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @classmethod
    def of_run(cls, training: dict[str, Any]) -> Self:
        """The options that a checkpoint was trained with; one that knows no guide had none."""
        return cls.from_dict({"guided_loss": False, **training})

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
