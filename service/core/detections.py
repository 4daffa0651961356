"""Detections, the parameters that they are made with, and the model that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from export.card import DetectorCard

# A threshold that no score reaches. It switches a class off inside the graph, so that its
# detections take no place among the candidates of the other classes.
OFF = 2.0


class DetectorModel(Protocol):
    """A served detector, as far as metrics and statistics describe it.

    Attributes:
        name: Name used in requests.
        version: Version under that name.
        sha256: Digest of the file.
        card: The detector's card.
    """

    name: str
    version: str
    sha256: str
    card: DetectorCard


@dataclass(frozen=True)
class DetectionParams:
    """Thresholds and limits in force for one request.

    Attributes:
        class_thresholds: float32 `[C]`; `OFF` for classes that were not asked for.
        iou_threshold: IoU above which NMS drops the lower-scored box of a class, in [0, 1].
        max_detections: At least 1.
    """

    class_thresholds: npt.NDArray[np.float32]
    iou_threshold: float
    max_detections: int

    def is_shipped_with(self, card: DetectorCard) -> bool:
        """Whether these are the thresholds and the IoU of the file itself."""
        shipped = np.array(card.class_thresholds, dtype=np.float32)
        return self.iou_threshold == card.iou_threshold and np.array_equal(
            self.class_thresholds, shipped
        )


@dataclass(frozen=True)
class Detections:
    """Detections in one image, in descending order of score.

    Attributes:
        boxes: float32 `[N, 4]`, x1, y1, x2, y2 in pixels of the model's input.
        scores: float32 `[N]`, in [0, 1], descending.
        labels: int64 `[N]`, indices into the card's class names.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outputs:
    """Outputs of the graph for a batch, padded to `M` detections per image.

    Attributes:
        boxes: float32 `[B, M, 4]`, x1, y1, x2, y2 in pixels of the model's input.
        scores: float32 `[B, M]`, in [0, 1], descending; 0 pads.
        labels: int64 `[B, M]`, indices into the card's class names; -1 pads.
        num_detections: int64 `[B]`, in [0, M].
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    num_detections: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.boxes)

    def image(self, index: int) -> Detections:
        """Return the detections of one image of the batch."""
        number = int(self.num_detections[index])
        return Detections(
            self.boxes[index, :number], self.scores[index, :number], self.labels[index, :number]
        )

    def part(self, start: int, stop: int) -> Outputs:
        """Return the outputs of images `start` to `stop` (exclusive)."""
        rows = slice(start, stop)
        return Outputs(
            self.boxes[rows], self.scores[rows], self.labels[rows], self.num_detections[rows]
        )
