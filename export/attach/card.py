"""A small JSON description of a detector that was trained elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.card import CardError, DetectorCard, Limit, Name, Preprocessing, Side, TrainingCard
from ghm_triton.evidence import ClassStatistics, ClassThreshold, Probability, as_float32

NOT_TOLD = "not told"
Row = tuple[float, float, float]


class AttachCard(BaseModel):
    """The facts about a detector that its ONNX file does not contain.

    Attributes:
        name: Name of the detector.
        class_names: The classes in the order of the model's scores.
        thresholds: Score in [0, 1] that a detection must reach, for all classes or by class name.
        size: `(height, width)` of the model's input in pixels.
        mean: Subtracted from grey levels / 255, in the order R, G, B.
        std: Divided by, in the same order. `1/255` each makes the input 0..255.
        color_order: Channel order of the model's input; `BGR` is swapped in the graph.
        pad_value: Grey level around a letterboxed image.
        resize: `letterbox` is the only method.
        iou_threshold: Overlap that NMS allows, in [0, 1].
        candidates: Number of boxes, the best, that enter NMS.
        max_detections: Most detections per image.
        architecture: Name of the architecture.
        backbone: Name of the backbone.
        data: Name of the training data.

    Example:
        >>> AttachCard(name="yolo", class_names=["cat", "dog"], thresholds=0.25, size=(640, 640))
        ... # doctest: +ELLIPSIS
        AttachCard(name='yolo', ...)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Name
    class_names: Annotated[list[str], Field(min_length=1)]
    thresholds: Probability | dict[str, Probability]
    size: tuple[Side, Side]
    mean: Row = (0.0, 0.0, 0.0)
    std: Row = (1.0, 1.0, 1.0)
    color_order: Literal["RGB", "BGR"] = "RGB"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    resize: Literal["letterbox"] = "letterbox"
    iou_threshold: Probability = 0.5
    candidates: Limit = 1000
    max_detections: Limit = 100
    architecture: str = NOT_TOLD
    backbone: str = NOT_TOLD
    data: str = NOT_TOLD

    @model_validator(mode="after")
    def _one_threshold_per_class(self) -> Self:
        if isinstance(self.thresholds, dict) and set(self.thresholds) != set(self.class_names):
            raise ValueError(
                f"thresholds are for {sorted(self.thresholds)}, classes are {self.class_names}"
            )
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read the JSON file.

        Raises:
            CardError: It is not JSON, or a field is missing, unknown or out of range.
            OSError: It cannot be read.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the card"
            raise CardError(f"{path}: not valid at {place}: {first['msg']}") from error
        except (ValueError, RecursionError) as error:
            raise CardError(f"{path}: not JSON: {error}") from error

    def detector_card(self, sha256: str) -> DetectorCard:
        """Return the card of the file that `ghm attach` writes.

        There is no evidence from training: statistics are zero, and all thresholds are manual.

        Args:
            sha256: The digest of the model's file, 64 hexadecimal digits.

        Raises:
            CardError: A field is out of range, or class names repeat.
        """
        names, (height, width) = self.class_names, self.size
        scores = self.thresholds
        by_name = scores if isinstance(scores, dict) else dict.fromkeys(names, scores)
        nothing = np.zeros((len(names), 1), np.int64)
        named = {"name", "architecture", "backbone", "class_names", "candidates", "max_detections"}
        try:
            return DetectorCard(
                **self.model_dump(include=named),
                threshold_policy="by hand",
                thresholds=[
                    ClassThreshold(name, as_float32(by_name[name]), "manual", 0, 0)
                    for name in names
                ],
                iou_threshold=as_float32(self.iou_threshold),
                preprocessing=Preprocessing(
                    height=height,
                    width=width,
                    **self.model_dump(include={"pad_value", "mean", "std"}),
                ),
                statistics=ClassStatistics(
                    tuple(names), positive_scores=nothing, negative_scores=nothing
                ),
                training=TrainingCard(
                    data=self.data,
                    losses={},
                    seed=0,
                    steps=0,
                    versions={},
                    checkpoint_sha256=sha256,
                ),
            )
        except ValidationError as error:
            raise CardError(f"the card is not valid: {error.errors()[0]['msg']}") from error
