"""What the owner of a detector says of it, so that a card can be made: a small JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from export.card import CardError, DetectorCard, Preprocessing, TrainingCard
from ghm_triton.evidence import ClassStatistics, ClassThreshold, Probability, as_float32

NOT_TOLD = "not told"
Side = Annotated[int, Field(gt=0)]
Row = tuple[float, float, float]


class AttachCard(BaseModel):
    """What a model's own file does not say.

    Attributes:
        name: What the detector calls itself.
        class_names: In the order of the model's scores.
        thresholds: The score that a detection must reach: one for all classes, or by class name.
        size: `(height, width)` in pixels of the images that the model takes.
        mean: Subtracted from grey levels / 255, in the order R, G, B.
        std: Divided by, in the same order. `1/255` each makes the input 0..255.
        color_order: What the model takes; `BGR` is swapped in the graph.
        pad_value: Grey level beside a letterboxed image.
        resize: Images are letterboxed; there is no other way yet.
        iou_threshold: The overlap that NMS allows.
        candidates: Boxes that NMS gets to see, the best.
        max_detections: Most detections of an image.
        architecture: What the network is.
        backbone: What its features come from.
        data: What it was trained on.

    Example:
        >>> AttachCard(name="yolo", class_names=["cat", "dog"], thresholds=0.25, size=(640, 640))
        ... # doctest: +ELLIPSIS
        AttachCard(name='yolo', ...)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1)]
    class_names: Annotated[list[str], Field(min_length=1)]
    thresholds: Probability | dict[str, Probability]
    size: tuple[Side, Side]
    mean: Row = (0.0, 0.0, 0.0)
    std: Row = (1.0, 1.0, 1.0)
    color_order: Literal["RGB", "BGR"] = "RGB"
    pad_value: Annotated[int, Field(ge=0, le=255)] = 114
    resize: Literal["letterbox"] = "letterbox"
    iou_threshold: Probability = 0.5
    candidates: Annotated[int, Field(gt=0)] = 1000
    max_detections: Annotated[int, Field(gt=0)] = 100
    architecture: str = NOT_TOLD
    backbone: str = NOT_TOLD
    data: str = NOT_TOLD

    @model_validator(mode="after")
    def _a_threshold_a_class(self) -> Self:
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
        """The card of the file that `ghm attach` writes.

        Nothing was counted in training, so there is no evidence: statistics are zero, and every
        threshold was set by hand.

        Args:
            sha256: The digest of the model's file, 64 hexadecimal digits.

        Raises:
            CardError: A field is out of range, or class names repeat.
        """
        try:
            return self._card(sha256)
        except ValidationError as error:
            raise CardError(f"the card is not valid: {error.errors()[0]['msg']}") from error

    def _card(self, sha256: str) -> DetectorCard:
        by_name = self.thresholds
        if not isinstance(by_name, dict):
            by_name = dict.fromkeys(self.class_names, by_name)
        count, (height, width) = len(self.class_names), self.size
        return DetectorCard(
            name=self.name,
            architecture=self.architecture,
            backbone=self.backbone,
            class_names=self.class_names,
            threshold_policy="by hand",
            thresholds=[
                ClassThreshold(
                    name=name,
                    threshold=as_float32(by_name[name]),
                    source="manual",
                    support=0,
                    ground_truths=0,
                )
                for name in self.class_names
            ],
            iou_threshold=as_float32(self.iou_threshold),
            candidates=self.candidates,
            max_detections=self.max_detections,
            preprocessing=Preprocessing(
                height=height,
                width=width,
                pad_value=self.pad_value,
                mean=self.mean,
                std=self.std,
            ),
            statistics=ClassStatistics(
                tuple(self.class_names),
                positive_scores=np.zeros((count, 1), np.int64),
                negative_scores=np.zeros((count, 1), np.int64),
            ),
            training=TrainingCard(
                data=self.data, losses={}, seed=0, steps=0, versions={}, checkpoint_sha256=sha256
            ),
        )
