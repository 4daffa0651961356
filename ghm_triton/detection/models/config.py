"""What a detector is, apart from its weights: everything needed to build it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

ARCHITECTURES = ("retinanet", "fcos", "faster-rcnn")
CLASSIFIERS = ("sigmoid", "softmax")
ASSIGNERS = ("iou", "cleanliness")
BACKBONES = ("tiny", "resnet18", "resnet34", "resnet50", "resnet101")


@dataclass(frozen=True)
class DetectorConfig:
    """A detector, described.

    Attributes:
        class_names: The classes in label order, `0..C-1`.
        image_size: `(height, width)` of the network's input in pixels, multiples of 32.
        backbone: One of `BACKBONES`: torchvision's ResNets with FPN levels P3..P7 (Faster R-CNN:
            P2..P6), or `tiny`, five convolution stages with levels P3..P5, that trains in minutes
            on two cores.
        channels: Width of `tiny`, of its pyramid and head; the ResNets' pyramid has 256.
        head_convs: 3x3 convolutions before each dense predictor, 1 to 4 (RetinaNet's paper: 4;
            Faster R-CNN's proposals: 1).
        anchor_scale: Side of the smallest square anchor of a level, in units of its stride; FCOS
            has no anchors.
        prior: Foreground probability that a sigmoid's bias starts from, in (0, 1).
        mean: Channel means subtracted after scaling grey levels to [0, 1].
        std: Channel deviations divided by.
        pad_value: Grey level, 0..255, around a letterboxed image.
        iou_threshold: NMS overlap, in [0, 1].
        candidates: Anchors or points kept by score before NMS; of a Faster R-CNN's level, those
            kept before the NMS of proposals.
        max_detections: Detections kept after NMS.
        architecture: One of `ARCHITECTURES`.
        classifier: `sigmoid`, a probability for every class, or `softmax` with background as a
            class of its own (Faster R-CNN only).
        proposals: Regions that Faster R-CNN looks into, an image.
        region_samples: Regions that it learns from, an image.
        assigner: How anchors learn: `iou`, by thresholds of overlap, or `cleanliness`: the best
            anchors of every box, each as far as it is clean (`ghm_triton.imbalance.cleanliness`).
            Faster R-CNN's are those of its proposal network; FCOS has none.
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
    classifier: str = "sigmoid"
    proposals: int = 300
    region_samples: int = 128
    assigner: str = "iou"

    def __post_init__(self) -> None:
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"class_names must be distinct and not empty, got {self.class_names}")
        for name, allowed in (
            ("architecture", ARCHITECTURES),
            ("backbone", BACKBONES),
            ("classifier", CLASSIFIERS),
            ("assigner", ASSIGNERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if self.classifier == "softmax" and self.architecture != "faster-rcnn":
            raise ValueError(
                f"classifier must be sigmoid for {self.architecture}, whose places are mostly"
                " background; got 'softmax'"
            )
        if self.assigner == "cleanliness" and self.architecture == "fcos":
            raise ValueError(
                "assigner must be iou for fcos, which has no anchors to rank by their overlap;"
                " got 'cleanliness'"
            )
        for name in ("candidates", "max_detections", "proposals", "region_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
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
