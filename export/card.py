"""The contract of `detector.onnx`: the card that travels in its metadata.

The card is what the file says of itself: its classes in order, the threshold of each and
the evidence behind it, how an image becomes its input, and what it was trained with. Whoever
writes a file fills one in, whoever reads a file trusts nothing else. This module imports
neither torch nor onnx.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Annotated, Any, Literal, Self

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
CARD_KEY = "ghm.card"

INPUT = "images"
THRESHOLDS_INPUT = "class_thresholds"
IOU_INPUT = "iou_threshold"
OUTPUTS = ("boxes", "scores", "labels", "num_detections")


class CardError(ValueError):
    """The file has no card, a card this version cannot read, or a card that contradicts it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


InputType = Literal["float32", "uint8"]
Precision = Literal["int8", "fp16"]


class Preprocessing(_Frozen):
    """How an RGB image becomes what the network sees.

    The image keeps its aspect ratio: it is resized (bilinear, antialiased) by
    `min(height / h, width / w)`, laid at the top left, and the rest is filled with `pad_value`.
    Then `x = (grey / 255 - mean) / std`, channels first.
    """

    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]
    color_order: Literal["RGB"] = "RGB"
    resize: Literal["letterbox"] = "letterbox"
    interpolation: Literal["bilinear"] = "bilinear"
    padding: Literal["bottom_right"] = "bottom_right"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @field_validator("std")
    @classmethod
    def _positive_std(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        return std

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """The `(width, height)` that an image of `width x height` is resized to."""
        scale = min(self.width / width, self.height / height)
        return max(1, round(width * scale)), max(1, round(height * scale))


class TrainingCard(_Frozen):
    """What the weights come from: data set, losses, seed, steps, versions and the checkpoint."""

    data: str
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
        except (TypeError, ValueError) as error:
            raise ValueError(f"losses must be what JSON can hold: {error}") from error
        return losses


class QuantizationCard(_Frozen):
    """How the numbers of the network's core were made smaller, and what that cost.

    Attributes:
        precision: What the core computes with; thresholds and what decodes boxes stay float32.
        calibration_data: The data set whose images showed the ranges of the core's activations;
            None where nothing needs them (`fp16`).
        calibration_split: Its split, None likewise.
        calibration_images: How many of its images.
        test_data: The data set that both precisions were measured on.
        test_split: Its split.
        test_images: How many of its images.
        ap_before: COCO AP of the float32 detector there.
        ap_after: COCO AP of this file there.
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
    """Everything that a reader of `detector.onnx` may rely on.

    Attributes:
        format_version: Of the card, 1 or 2; cards are written with the newest.
        name: What the detector calls itself.
        architecture: What the network is.
        backbone: What its features come from.
        input: What `images` is. `float32`: `[B, 3, height, width]`, prepared by the caller as
            `preprocessing` says. `uint8`: RGB images as they are, `[B, any height, any width, 3]`,
            which the graph prepares. Boxes are in pixels of `images` in either case.
        class_names: In the order of labels.
        threshold_policy: What chose every threshold whose `source` is not `manual`.
        thresholds: One entry a class, in the order of labels.
        iou_threshold: Of two boxes of a class that overlap by more, only the better stays.
        candidates: Anchors of an image that NMS gets to see, the best.
        max_detections: Most detections of an image, `M` of the outputs.
        preprocessing: How an RGB image becomes what the network sees.
        statistics: What training counted; the held-out scores are those of this file's precision.
        training: What the weights come from.
        quantization: How the network was made smaller; None for float32.
    """

    format_version: Literal[1, 2] = FORMAT_VERSION
    name: Annotated[str, Field(min_length=1)]
    architecture: str
    backbone: str
    input: InputType = "float32"
    class_names: Annotated[list[str], Field(min_length=1)]
    threshold_policy: str
    thresholds: list[ClassThreshold]
    iou_threshold: Probability
    candidates: Annotated[int, Field(gt=0)]
    max_detections: Annotated[int, Field(gt=0)]
    preprocessing: Preprocessing
    statistics: ClassStatistics
    training: TrainingCard
    quantization: QuantizationCard | None = None

    @field_validator("statistics", mode="before")
    @classmethod
    def _read_statistics(cls, statistics: Any, info: ValidationInfo) -> Any:
        """Complete JSON with the class names; copy an instance, which may go on counting."""
        if isinstance(statistics, ClassStatistics):
            return copy.deepcopy(statistics)
        if isinstance(statistics, dict) and "class_names" in info.data:
            return ClassStatistics.from_dict(
                {"class_names": info.data["class_names"], **statistics}
            )
        return statistics

    @model_validator(mode="after")
    def _one_entry_a_class(self) -> Self:
        names = self.class_names
        if len(set(names)) != len(names):
            raise ValueError(f"class names repeat: {names}")
        judged = [entry.name for entry in self.thresholds]
        if judged != names:
            raise ValueError(f"thresholds are for {judged}, classes are {names}")
        if self.statistics.class_names != tuple(names):
            counted = list(self.statistics.class_names)
            raise ValueError(f"statistics are for {counted}, classes are {names}")
        return self

    @property
    def class_thresholds(self) -> list[float]:
        """The thresholds in class order."""
        return [entry.threshold for entry in self.thresholds]

    def threshold_table(self) -> str:
        """Format the thresholds and the evidence behind them for a terminal."""
        return ClassThresholds(self.threshold_policy, tuple(self.thresholds)).table()

    def to_json(self) -> str:
        """The card as JSON with sorted keys, so that equal cards are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a card.

        Raises:
            CardError: The text is not JSON, its `format_version` is newer than this package
                reads, or a field is missing or out of range.
        """
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, or a number beyond all sense
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
            place = ".".join(str(part) for part in first["loc"]) or "card"
            raise CardError(f"the card is not valid at {place}: {first['msg']}") from error

    def check_initializers(self, class_thresholds: list[float], iou_threshold: float) -> None:
        """Refuse a file whose graph would not do what its card says.

        Raises:
            CardError: A threshold in the graph differs from the card's, or their number does.
        """
        found, wanted = len(class_thresholds), len(self.class_names)
        if found != wanted:
            raise CardError(f"the graph has {found} thresholds, the card {wanted}")
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
