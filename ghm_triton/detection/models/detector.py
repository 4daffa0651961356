"""What every detector offers: losses to train by, and predictions to choose detections from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ghm_triton.detection.models.config import DetectorConfig


class Predictions(NamedTuple):
    """All that a detector says of some images, before thresholds and NMS choose.

    `P` places (anchors, points or regions) are scored for `C` classes. Their boxes are one for all
    classes (`G = 1`) or one a class (`G = C`).

    Attributes:
        boxes: float32 `[B, P, G, 4]`, x1 y1 x2 y2 in input pixels, clipped to the image.
        scores: float32 `[B, P, C]` in [0, 1], which thresholds are compared with.
        ranks: float32 `[B, P, C]`, rising with the score and without its ties: near 1 the scores
            of a confident detector are equal in float32, and each runtime would break the ties
            its own way. `postprocess.OUT` where there is nothing to detect.
    """

    boxes: Tensor
    scores: Tensor
    ranks: Tensor


class Detector(nn.Module, ABC):
    """A detector on images of one fixed, letterboxed size; a base beside torchvision's classes.

    Attributes:
        config: What was built.
    """

    config: DetectorConfig

    @abstractmethod
    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses of one batch; for detections see `postprocess.DeployedDetector`.

        Args:
            images: Normalised, letterboxed images, float `[B, 3, H, W]` with `(H, W)` the
                configuration's `image_size`.
            targets: One dict an image: `boxes` `[N, 4]` in input pixels, `labels` int64 `[N]`, and
                optionally `ignore` bool `[N]`: boxes that are neither learnt nor unlearnt.

        Returns:
            Scalars by name: `classification` and `bbox_regression`, and others of the detector's.

        Raises:
            RuntimeError: The detector was built without losses.
            ValueError: The images have another size.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every place; in operations that export with any batch size.

        Raises:
            ValueError: The images have another size.
        """

    @abstractmethod
    def observe_labels(self, observer: Callable[[Tensor], None]) -> None:
        """Have `observer` called with what the classification loss is to learn, for statistics.

        It gets int64 labels of any shape, once a training batch: `C` is background, -1 ignored.
        """

    def require_size(self, images: Tensor) -> None:
        """Raise a ValueError unless the images have the configuration's size."""
        if tuple(images.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} pixels,"
                f" the detector takes {self.config.image_size}"
            )
