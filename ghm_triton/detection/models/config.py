"""The description of a detector: everything but its weights that is needed to build it."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass
from typing import Any, Self

from ghm_triton.options import FRACTION, Check, Rule, at_least, check_options, option, require

ARCHITECTURES = ("retinanet", "fcos", "faster-rcnn")
CLASSIFIERS = ("sigmoid", "softmax")
ASSIGNERS = ("iou", "cleanliness")
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")

DISTINCT = Check("be distinct and not empty", lambda v: bool(v) and len(set(v)) == len(v))
MOST_SIDE = 16_384  # pixels of the input, as of a card
MOST_CHANNELS = 4096

FRAME = Check(
    f"be multiples of 32 up to {MOST_SIDE}",
    lambda v: all(32 <= side <= MOST_SIDE and side % 32 == 0 for side in v),
)

RULES = (
    Rule(
        lambda c: c.classifier == "softmax" and c.architecture != "faster-rcnn",
        "classifier must be sigmoid for {architecture}, whose places are mostly background;"
        " got 'softmax'",
    ),
    Rule(
        lambda c: c.assigner == "cleanliness" and c.architecture == "fcos",
        "assigner must be iou for fcos, which has no anchors to rank by their overlap;"
        " got 'cleanliness'",
    ),
)


def image_size(text: str) -> tuple[int, int]:
    """`256x320` as `(256, 320)`, height first."""
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 256x320, got {text!r}")
    return int(sides[1]), int(sides[2])


@dataclass(frozen=True)
class DetectorConfig:
    """A detector, described; each field is documented by its help text.

    Raises:
        ValueError: A value is out of range or does not fit the architecture.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic

    class_names: tuple[str, ...] = option(
        help="the classes in label order, 0..C-1", check=DISTINCT, hidden=True
    )
    image_size: tuple[int, int] = option(
        help="height and width of the network's input in pixels, multiples of 32",
        group="detector",
        check=FRAME,
        type=image_size,
        metavar="HxW",
        shown="128x128 for digits, else 320x320",
    )
    backbone: str = option(
        "tiny",
        "feature pyramid: a ResNet of torchvision with levels P3..P7 (faster-rcnn: P2..P6), or"
        " tiny, five convolution stages with levels P3..P5 that train in minutes on two cores",
        group="detector",
        choices=BACKBONES,
    )
    channels: int = option(
        64,
        "width of tiny, of its pyramid and head; a ResNet's pyramid has 256",
        group="detector",
        check=Check(
            f"be a multiple of 8 up to {MOST_CHANNELS}",
            lambda value: 8 <= value <= MOST_CHANNELS and value % 8 == 0,
        ),
    )
    head_convs: int = option(
        2,
        "3x3 convolutions before each dense predictor, 1 to 4",
        group="detector",
        check=Check("be 1 to 4", lambda value: 1 <= value <= 4),
    )
    anchor_scale: float = option(
        3.0, "side of a level's smallest square anchor, in strides", group="detector"
    )
    prior: float = option(
        0.01,
        "foreground probability that a sigmoid's bias starts from, in (0, 1)",
        group="detector",
        check=Check("lie in (0, 1)", lambda value: 0.0 < value < 1.0),
    )
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_value: int = option(114, "grey level, 0..255, around a letterboxed image", hidden=True)
    iou_threshold: float = option(
        0.5, "IoU above which NMS drops the lower-scored box", check=FRACTION, hidden=True
    )
    candidates: int = option(
        1000,
        "anchors or points kept by score before NMS; of faster-rcnn, those of a level kept before"
        " the NMS of proposals",
        check=at_least(1),
        hidden=True,
    )
    max_detections: int = option(100, "detections kept after NMS", check=at_least(1), hidden=True)
    architecture: str = option(
        "retinanet",
        "architecture; fcos has no anchors, faster-rcnn has two stages",
        flag="--detector",
        group="detector",
        choices=ARCHITECTURES,
    )
    classifier: str = option(
        "sigmoid",
        "sigmoid, one probability per class, or softmax, with background as the first class"
        " (faster-rcnn only)",
        choices=CLASSIFIERS,
        hidden=True,
    )
    proposals: int = option(
        300, "regions per image that faster-rcnn classifies", group="detector", check=at_least(1)
    )
    region_samples: int = option(
        128,
        "regions per image that faster-rcnn is trained on, where they are sampled",
        group="detector",
        check=at_least(1),
    )
    assigner: str = option(
        "iou",
        "how anchors (of faster-rcnn: of its proposals) are assigned: by IoU thresholds, or"
        " cleanliness: the best anchors of each box, with a soft label",
        group="detector",
        choices=ASSIGNERS,
    )

    def __post_init__(self) -> None:
        check_options(self)
        require(RULES, self)

    @property
    def num_classes(self) -> int:
        """Number of foreground classes, `C`."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is unknown, missing or out of range.
        """
        from pydantic import TypeAdapter, ValidationError  # of no use for `ghm --help`

        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            given = f"{where} is {first['input']!r:.50}: " if where else ""
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"not a detector configuration: {given}{reason}") from error
