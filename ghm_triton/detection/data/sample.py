"""A sample of a data set: an image and its boxes."""

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
        ignore: bool `[N]`. True for a box that is excluded from training and evaluation: Pascal
            VOC's `difficult` objects and COCO's `iscrowd` regions.
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
    """A map-style data set of `Sample`.

    Attributes:
        name: Kind and folder, such as `"digits"` or `"voc:bccd"`.
        split: The split, such as `"train"`.
        class_names: Names by label.
        problems: Damaged annotations that were skipped or repaired.
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
    """Boxes as float32 `[N, 4]`, with `N = 0` for an empty list."""
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
