"""What a detector is, apart from its weights: everything needed to build it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


@dataclass(frozen=True)
class DetectorConfig:
    """A RetinaNet, described.

    Attributes:
        class_names: The classes in label order, `0..C-1`.
        image_size: `(height, width)` of the network's input in pixels, multiples of 32.
        backbone: One of `BACKBONES`: torchvision's ResNets with FPN levels P3..P7, or `tiny`, five
            convolution stages with levels P3..P5, that trains in minutes on two cores.
        channels: Channels of the FPN and of the head (and the width of `tiny`).
        head_convs: 3x3 convolutions before each predictor, 1 to 4 (RetinaNet's paper: 4).
        anchor_scale: Side of the smallest square anchor of a level, in units of its stride.
        prior: Foreground probability that the classification bias starts from, in (0, 1).
        mean: Channel means subtracted after scaling grey levels to [0, 1].
        std: Channel deviations divided by.
        pad_value: Grey level, 0..255, around a letterboxed image.
        iou_threshold: NMS overlap, in [0, 1].
        candidates: Anchors kept by score before NMS.
        max_detections: Detections kept after NMS.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    backbone: str = "tiny"
    channels: int = 64
    head_convs: int = 2
    anchor_scale: float = 3.0
    prior: float = 0.01
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    pad_value: int = 114
    iou_threshold: float = 0.5
    candidates: int = 1000
    max_detections: int = 100
    architecture: str = "retinanet"

    def __post_init__(self) -> None:
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names must be distinct and not empty, got {self.class_names}")
        if self.backbone not in BACKBONES:
            raise ValueError(
                f"backbone must be one of {', '.join(BACKBONES)}, got {self.backbone!r}"
            )
        if any(side < 32 or side % 32 for side in self.image_size):
            raise ValueError(f"image_size must be multiples of 32, got {self.image_size}")
        if not 0.0 < self.prior < 1.0:
            raise ValueError(f"prior must lie in (0, 1), got {self.prior}")
        if not 1 <= self.head_convs <= 4:
            raise ValueError(f"head_convs must be 1 to 4, got {self.head_convs}")
        if not 0.0 <= self.iou_threshold <= 1.0:
            raise ValueError(f"iou_threshold must lie in [0, 1], got {self.iou_threshold}")
        if self.channels < 8 or self.channels % 8:
            raise ValueError(f"channels must be a multiple of 8, got {self.channels}")

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
        tuples: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        try:
            return cls(**tuples)
        except TypeError as error:
            raise ValueError(f"not a detector configuration: {error}") from error
