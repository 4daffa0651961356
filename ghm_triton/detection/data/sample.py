"""What every data set gives: an image and the boxes in it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ghm_triton.detection.data.problems import AnnotationProblem


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with its ground truth.

    Attributes:
        image: RGB, turned upright.
        boxes: float32 `[N, 4]`, `x1, y1, x2, y2` in image pixels; pixel `i` spans `[i, i + 1)`,
            so `0 <= x1 < x2 <= width` and `0 <= y1 < y2 <= height`.
        labels: int64 `[N]`, indices into the data set's `class_names`.
        ignore: bool `[N]`. True for a box that is neither to be learnt nor to be counted for or
            against a detector: Pascal VOC's `difficult` objects and COCO's `iscrowd` regions.
        image_id: Unique in the data set and the same each time it is opened.
        source: The file's name, or a generated one, for messages.
    """

    image: Image.Image
    boxes: Tensor
    labels: Tensor
    ignore: Tensor
    image_id: int
    source: str


class DetectionDataset(Dataset[Sample]):
    """A map-style data set of `Sample`, the same whatever it was read from.

    Attributes:
        name: What it was opened as, such as `"digits"` or `"voc:bccd"`.
        split: The split, such as `"train"`.
        class_names: Names by label.
        problems: What was wrong with the annotations and was skipped or repaired.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        problems: list[AnnotationProblem] | None = None,
    ) -> None:
        self.name = name
        self.split = split
        self.class_names = class_names
        self.problems = problems if problems is not None else []

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def sources(self) -> set[str]:
        """The `source` of every sample, without decoding an image."""


def box_tensor(boxes: list[tuple[float, float, float, float]]) -> Tensor:
    """float32 `[N, 4]`, also when there is no box at all."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
