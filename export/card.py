"""The card in the metadata of `detector.onnx`, which describes the file to its readers.

It holds the classes in order, the threshold of each with the evidence behind it, the preprocessing
of images, and the training. Imports neither torch nor onnx.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ghm_triton.evidence import (
    ClassStatistics,
    ClassThreshold,
    ClassThresholds,
    Count,
    Probability,
    as_float32,
)

# 1: float32 inputs, thresholds by policy. 2: `input`, `quantization`, thresholds set by hand.
FORMAT_VERSION: Literal[2] = 2
# Far above what detectors have, and low enough that no card makes a reader run out of time or
# memory.
MAX_CARD_BYTES = 2**25
MAX_CLASSES = 10_000
MAX_SIDE = 2**14  # pixels
MAX_PIXELS = 2**25
MAX_CANDIDATES = 10**6
MAX_DEPTH = 10  # of lists and objects in `losses`
MAX_COUNT = 2**53  # sums over bins still fit 64 bits, and are exact as floats
CARD_KEY = "ghm.card"

INPUT = "images"
THRESHOLDS_INPUT = "class_thresholds"
IOU_INPUT = "iou_threshold"
OUTPUTS = ("boxes", "scores", "labels", "num_detections")


class CardError(ValueError):
    """The file has no card, a card that this version cannot read, or one that contradicts it."""


Text = Annotated[str, Field(max_length=1000)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Side = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Limit = Annotated[int, Field(gt=0, le=MAX_CANDIDATES)]
Shift = Annotated[float, Field(ge=-1e6, le=1e6)]
Scale = Annotated[float, Field(le=1e6)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


InputType = Literal["float32", "uint8"]
Precision = Literal["int8", "fp16"]


class Preprocessing(_Frozen):
    """Preprocessing of an RGB image for the network.

    The image keeps its aspect ratio: it is resized (bilinear, antialiased) by
    `min(height / h, width / w)` and placed at the top left; the rest is filled with `pad_value`.
    Then `x = (value / 255 - mean) / std`, channels first.
    """

    height: Side
    width: Side
    color_order: Literal["RGB"] = "RGB"
    resize: Literal["letterbox"] = "letterbox"
    interpolation: Literal["bilinear"] = "bilinear"
    padding: Literal["bottom_right"] = "bottom_right"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    mean: tuple[Shift, Shift, Shift]
    std: tuple[Scale, Scale, Scale]

    @field_validator("std")
    @classmethod
    def _positive_std(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) < 1e-6:
            raise ValueError(f"std must be positive, at least 1e-6, got {std}")
        return std

    @model_validator(mode="after")
    def _few_pixels(self) -> Self:
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(
                f"{self.height} x {self.width} are more than {MAX_PIXELS:,} pixels of input"
            )
        return self

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the `(width, height)` to which an image is resized."""
        scale = min(self.width / width, self.height / height)
        return max(1, round(width * scale)), max(1, round(height * scale))


class TrainingCard(_Frozen):
    """Origin of the weights: data set, losses, seed, steps, versions and checkpoint."""

    data: Text
    losses: dict[str, Any]
    seed: int
    steps: Count
    versions: dict[str, str]
    checkpoint_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @field_validator("losses")
    @classmethod
    def _is_json(cls, losses: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(losses, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"losses must be what JSON can hold: {error}") from error
        level: list[Any] = [losses]
        for _ in range(MAX_DEPTH):
            level = [inner for each in level for inner in _inside(each)]
        if level:
            raise ValueError(f"losses are nested more than {MAX_DEPTH} deep")
        return losses


class QuantizationCard(_Frozen):
    """Quantization of the network's core, and its cost in average precision.

    Attributes:
        precision: Arithmetic of the core; thresholds and the decoding of boxes stay float32.
        calibration_data: Data set from which the ranges of activations were taken; None for
            `fp16`, which needs none.
        calibration_split: Its split; None for `fp16`.
        calibration_images: Number of images used.
        test_data: Data set on which both precisions were evaluated.
        test_split: Its split.
        test_images: Number of images evaluated.
        ap_before: COCO AP of the float32 detector.
        ap_after: COCO AP of this file.
    """

    precision: Precision
    calibration_data: str | None = None
    calibration_split: str | None = None
    calibration_images: Count = 0
    test_data: str
    test_split: str
    test_images: Annotated[int, Field(gt=0)]
    ap_before: Probability
    ap_after: Probability


class DetectorCard(_Frozen):
    """The card of `detector.onnx`: all that a reader of the file may rely on.

    Attributes:
        format_version: Version of the card, 1 or 2; cards are written with the newest.
        name: Name of the detector.
        architecture: Architecture of the network.
        backbone: Backbone of the network.
        input: Type of the input `images`. `float32`: `[B, 3, height, width]`, preprocessed by the
            caller. `uint8`: RGB images of any size, `[B, H, W, 3]`, which the graph preprocesses.
            Boxes are in pixels of `images` in either case.
        class_names: The classes in label order.
        threshold_policy: Policy of every threshold whose `source` is not `manual`.
        thresholds: One entry per class, in label order.
        iou_threshold: IoU above which NMS suppresses the lower-scored of two boxes of a class.
        candidates: Number of highest-scored anchors per image that enter NMS.
        max_detections: Largest number of detections per image, `M` of the outputs.
        preprocessing: Preprocessing of images.
        statistics: Training statistics; the held-out scores are those of this file's precision.
        training: Origin of the weights.
        quantization: Quantization of the network; None for float32.
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: Name
    architecture: Text
    backbone: Text
    input: InputType = "float32"
    class_names: Annotated[list[Text], Field(min_length=1, max_length=MAX_CLASSES)]
    threshold_policy: Text
    thresholds: Annotated[list[ClassThreshold], Field(max_length=MAX_CLASSES)]
    iou_threshold: Probability
    candidates: Limit
    max_detections: Limit
    preprocessing: Preprocessing
    statistics: ClassStatistics
    training: TrainingCard
    quantization: QuantizationCard | None = None

    @field_validator("statistics", mode="before")
    @classmethod
    def _read_statistics(cls, statistics: Any, info: ValidationInfo) -> Any:
        # JSON has no class names here. An instance is copied, since its owner may go on counting.
        if isinstance(statistics, ClassStatistics):
            return copy.deepcopy(statistics)
        if isinstance(statistics, dict) and (names := info.data.get("class_names")):
            return ClassStatistics.from_dict({"class_names": names, **statistics})
        return statistics

    @model_validator(mode="after")
    def _check_classes(self) -> Self:
        names = self.class_names
        if len(set(names)) != len(names):
            raise ValueError(f"class names repeat: {_shown(names)}")
        for field, covered in (
            ("thresholds", [entry.name for entry in self.thresholds]),
            ("statistics", list(self.statistics.class_names)),
        ):
            if covered != names:
                raise ValueError(f"{field} are for {_shown(covered)}, classes are {_shown(names)}")
        counted = self.statistics
        for field in (
            "anchors",
            "positives",
            "ground_truths",
            "positive_scores",
            "negative_scores",
        ):
            if (most := np.max(getattr(counted, field), initial=0)) > MAX_COUNT:
                raise ValueError(f"{field} count to {most}; at most {MAX_COUNT} are read")
        return self

    @property
    def class_thresholds(self) -> list[float]:
        """The thresholds in label order."""
        return [entry.threshold for entry in self.thresholds]

    def threshold_table(self) -> str:
        """Format the thresholds and the evidence behind them for a terminal."""
        return ClassThresholds(self.threshold_policy, tuple(self.thresholds)).table()

    def to_json(self) -> str:
        """Return the card as JSON with sorted keys, so that equal cards are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a card.

        Raises:
            CardError: The text is not JSON, its `format_version` is too new for this package, or
                a field is missing or out of range.
        """
        if len(text) > MAX_CARD_BYTES:
            raise CardError(
                f"the card has {len(text):,} characters; at most {MAX_CARD_BYTES:,} are read"
            )
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError also for a number too long
            raise CardError(f"the card is not JSON: {error}") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise CardError(
                f"the card has format_version {version}; this package reads up to {FORMAT_VERSION}."
                " Upgrade ghm-triton."
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "card"
            raise CardError(f"the card is not valid at {field}: {first['msg']}") from error

    def check_initializers(self, class_thresholds: list[float], iou_threshold: float) -> None:
        """Check that the thresholds in the graph are those of the card.

        Raises:
            CardError: A threshold differs, or their number does.
        """
        if len(class_thresholds) != len(self.thresholds):
            raise CardError(
                f"the graph has {len(class_thresholds)} thresholds, the card {len(self.thresholds)}"
            )
        for entry, value in zip(self.thresholds, class_thresholds, strict=True):
            if math.isnan(value) or value != entry.threshold:
                raise CardError(
                    f"class {entry.name!r}: the graph's threshold is {value!r},"
                    f" the card's {entry.threshold!r}"
                )
        if iou_threshold != as_float32(self.iou_threshold):
            raise CardError(
                f"the graph's iou_threshold is {iou_threshold!r}, the card's {self.iou_threshold!r}"
            )


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _shown(names: list[str]) -> str:
    return str(names) if len(names) <= 10 else f"{str(names[:10])[:-1]}, ... {len(names)} in all]"
