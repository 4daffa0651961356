"""Which options fit which detector: a table of rules, each with the sentence that refuses it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.config import IOU_LOSSES, TrainOptions
from ghm_triton.options import Rule, require

SOFTMAX_LOSSES = ("ce", "ghm-softmax")
TWO_STAGE = "faster-rcnn"


def _needless(flag: str, architecture: str, reason: str) -> Rule:
    """A flag that has no meaning for a detector."""
    name = flag.removeprefix("--").replace("-", "_")
    return Rule(
        lambda f: f.architecture == architecture and getattr(f, name) is not None,
        f"{flag} does not fit --detector {architecture}: {reason}",
    )


# Of flags: `f` holds those on the command line, and None for the others.
FLAG_RULES = (
    *(
        _needless(flag, architecture, reason)
        for architecture, places in (("retinanet", "anchor"), ("fcos", "point"))
        for flag, reason in (
            ("--proposals", "it has one stage, and proposes no regions"),
            ("--region-samples", f"it is trained on every {places}"),
            ("--sampling", f"it is trained on every {places}"),
            ("--adversarial-start", "it has one stage, and no regions to make harder"),
        )
    ),
    _needless("--anchor-scale", "fcos", "it has no anchors"),
    Rule(
        lambda f: f.prior is not None and f.init is not None,
        "--prior {prior} and --init {init} exclude each other",
    ),
    Rule(
        lambda f: f.mining_keep is not None and f.mining in (None, "none"),
        "--mining-keep has no meaning without --mining",
    ),
    Rule(
        lambda f: f.region_samples is not None and f.mining not in (None, "none"),
        "--region-samples has no meaning with --mining {mining}, which keeps --mining-keep of all"
        " regions",
    ),
    Rule(
        lambda f: f.region_samples is not None and f.sampling is False,
        "--region-samples has no meaning with --no-sampling, which trains on all regions",
    ),
    Rule(
        lambda f: f.classifier == "softmax" and f.prior is not None,
        "--prior {prior} does not fit --cls-loss {cls_loss}: a softmax has no such bias",
    ),
    Rule(
        lambda f: f.classifier == "softmax" and f.init not in (None, "optimal"),
        "--init {init} does not fit --cls-loss {cls_loss}: a softmax has no such bias",
    ),
)

# Of a run: `r` holds all of its options, and the detector's architecture, classifier and assigner.
RULES = (
    Rule(
        lambda r: r.architecture == "fcos" and r.reg_loss not in IOU_LOSSES,
        "reg_loss must be iou or giou for fcos, which regresses whole boxes, and GHM-R and smooth"
        " L1 are losses of single coordinates; got {reg_loss!r}",
    ),
    Rule(
        lambda r: r.architecture == TWO_STAGE and r.reg_loss in IOU_LOSSES,
        "reg_loss must be ghm or sl1 or asl1 for faster-rcnn, which regresses single coordinates,"
        " and IoU losses are losses of whole boxes; got {reg_loss!r}",
    ),
    Rule(
        lambda r: r.classifier == "softmax" and r.cls_loss not in SOFTMAX_LOSSES,
        "a softmax classifier is trained by cls_loss ce or ghm-softmax; ghm and focal are losses"
        " of sigmoids, got {cls_loss!r}",
    ),
    Rule(
        lambda r: r.classifier != "softmax" and r.cls_loss == "ghm-softmax",
        "cls_loss ghm-softmax is a loss of exclusive classes and needs a softmax classifier, as"
        " faster-rcnn can have; this detector's are sigmoids, which are trained by ghm",
    ),
    Rule(
        lambda r: not r.sampling and r.architecture != TWO_STAGE,
        "sampling must be True for {architecture}, which is always trained on every place; False"
        " is for faster-rcnn",
    ),
    Rule(
        lambda r: not r.sampling and not r.guided,
        "sampling=False needs guided_loss: unguided, background drowns the objects and boxes",
    ),
    Rule(
        lambda r: r.adversarial != "none" and r.architecture != TWO_STAGE,
        "adversarial must be none for {architecture}, which has one stage: an adversary hides and"
        " turns the pooled features of regions; got {adversarial!r}",
    ),
    Rule(
        lambda r: (
            r.mining != "none" and r.assigner == "cleanliness" and r.architecture != TWO_STAGE
        ),
        "mining must be none with assigner cleanliness, which trains on every anchor and gives"
        " the hard ones soft labels; got {mining!r}",
    ),
    Rule(
        lambda r: r.classifier == "softmax" and r.init not in ("prior", "optimal"),
        "init must be prior or optimal with a softmax classifier, which has no such bias (optimal"
        " is for the proposals); got {init!r}",
    ),
)


def require_compatible(
    options: TrainOptions, architecture: str, classifier: str = "sigmoid", assigner: str = "iou"
) -> None:
    """Check that a detector can be trained with the options.

    Args:
        options: Options of the run.
        architecture: `retinanet`, `fcos` or `faster-rcnn`.
        classifier: `sigmoid` or `softmax`; the latter with `faster-rcnn` only.
        assigner: `iou` or `cleanliness`.

    Raises:
        ValueError: It cannot; the message names the option and the reason.
    """
    detector = {"architecture": architecture, "classifier": classifier, "assigner": assigner}
    require(RULES, SimpleNamespace(**options.to_dict(), **detector, guided=options.guides()))


def from_flags(flags: dict[str, Any]) -> tuple[TrainOptions, dict[str, Any]]:
    """The options and the detector that flags describe, with defaults that follow from others.

    Args:
        flags: The flags on the command line, by field of `TrainOptions` and `DetectorConfig`.

    Returns:
        The options, and the fields of a `DetectorConfig` but for its classes.

    Raises:
        ValueError: A flag has no meaning or does not fit; no data has been opened.
    """
    architecture = flags.get("architecture", "retinanet")
    softmax = architecture == TWO_STAGE and flags.get("cls_loss") in SOFTMAX_LOSSES
    derived = {"architecture": architecture, "classifier": "softmax" if softmax else "sigmoid"}
    if architecture == "fcos":
        derived["reg_loss"] = "giou"
    flags = derived | flags
    names = {*TrainOptions.__dataclass_fields__, *DetectorConfig.__dataclass_fields__}
    require(FLAG_RULES, SimpleNamespace(**{**dict.fromkeys(names), **flags}))
    options = TrainOptions.from_dict(flags)
    frame = (128, 128) if options.data.partition(":")[0] == "digits" else (320, 320)
    known = DetectorConfig.__dataclass_fields__
    detector = {"image_size": frame, **{k: v for k, v in flags.items() if k in known}}
    config = DetectorConfig(class_names=("object",), **detector)  # checks the values
    require_compatible(options, config.architecture, config.classifier, config.assigner)
    return options, detector
