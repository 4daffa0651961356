"""Which methods fit which detector, and the reason where one does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ghm_triton.detection.training.config import TrainOptions

SOFTMAX_LOSSES = ("ce", "ghm-softmax")
OF_BOXES = ("iou", "giou")
# What a detector regresses: deltas to anchors and regions, or whole boxes from points.
DETECTOR_REG_LOSSES = {
    "retinanet": ("ghm", "sl1", "asl1", "iou", "giou"),
    "fcos": OF_BOXES,
    "faster-rcnn": ("ghm", "sl1", "asl1"),
}


def require_fitting(
    options: TrainOptions, architecture: str, classifier: str, assigner: str = "iou"
) -> None:
    """Check that a detector can learn as the options say.

    Args:
        options: Of the run.
        architecture: The detector's, as its configuration names it.
        classifier: The detector's, likewise.
        assigner: The detector's, likewise.

    Raises:
        ValueError: It cannot; the message names the option and the reason.
    """
    _require_regression(options.reg_loss, architecture)
    _require_classification(options.cls_loss, classifier)
    _require_sampling(options, architecture)
    if options.mining != "none" and assigner == "cleanliness" and architecture != "faster-rcnn":
        raise ValueError(
            "mining must be none with assigner cleanliness, which learns from every anchor and"
            f" doubts the hard ones; got {options.mining!r}"
        )
    if options.init not in ("prior", "optimal") and classifier == "softmax":
        raise ValueError(
            "init must be prior or optimal with a softmax classifier, which has no such bias"
            f" (optimal is of the proposals); got {options.init!r}"
        )


def _require_sampling(options: TrainOptions, architecture: str) -> None:
    if options.sampling:
        return
    if architecture != "faster-rcnn":
        raise ValueError(
            f"sampling must be True for {architecture}, which learns from every place whatever it"
            " says; False is of faster-rcnn"
        )
    if not options.guides():
        raise ValueError(
            "sampling=False needs guided_loss: unguided, background drowns the objects and boxes"
        )


def _require_regression(reg_loss: str, architecture: str) -> None:
    fitting = DETECTOR_REG_LOSSES[architecture]
    if reg_loss in fitting:
        return
    reason = (
        "learns single coordinates, and IoU losses are losses of whole boxes"
        if reg_loss in OF_BOXES
        else "learns whole boxes, and GHM-R and smooth L1 are losses of single coordinates"
    )
    raise ValueError(
        f"reg_loss must be {' or '.join(fitting)} for {architecture}, which {reason};"
        f" got {reg_loss!r}"
    )


def _require_classification(cls_loss: str, classifier: str) -> None:
    if classifier == "softmax" and cls_loss not in SOFTMAX_LOSSES:
        raise ValueError(
            "a softmax classifier learns by cls_loss ce or ghm-softmax; ghm and focal are losses"
            f" of sigmoids, got {cls_loss!r}"
        )
    if classifier != "softmax" and cls_loss == "ghm-softmax":
        raise ValueError(
            "cls_loss ghm-softmax is a loss of exclusive classes and needs a softmax classifier,"
            " as faster-rcnn can have; this detector's are sigmoids, which learn by ghm"
        )
