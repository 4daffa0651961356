"""The interface of every detector: losses for training, predictions for detection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ghm_triton.detection.models.anchors import assigned_labels
from ghm_triton.detection.models.config import DetectorConfig


class Predictions(NamedTuple):
    """The predictions of a detector before thresholds and NMS.

    `P` places (anchors, points or regions) are scored for `C` classes. Their boxes are shared by
    all classes (`G = 1`) or separate per class (`G = C`).

    Attributes:
        boxes: float32 `[B, P, G, 4]`, x1 y1 x2 y2 in input pixels, clipped to the image.
        scores: float32 `[B, P, C]` in [0, 1], which thresholds are compared with.
        ranks: float32 `[B, P, C]`, rising with the score but without its ties: near 1 the scores
            of a confident detector are equal in float32, and each runtime would break the ties
            in its own way. `postprocess.OUT` where there is nothing to detect.
    """

    boxes: Tensor
    scores: Tensor
    ranks: Tensor


class Detector(nn.Module, ABC):
    """A detector on images of one fixed, letterboxed size; a base beside torchvision's classes.

    Attributes:
        config: The detector's description.
    """

    config: DetectorConfig

    @abstractmethod
    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses of one batch; for detections see `postprocess.DeployedDetector`.

        Args:
            images: Normalised, letterboxed images, float `[B, 3, H, W]` with `(H, W)` the
                configuration's `image_size`.
            targets: One dict per image: `boxes` `[N, 4]` in input pixels, `labels` int64 `[N]`,
                and optionally `ignore` bool `[N]`: boxes excluded from the loss.

        Returns:
            Scalars by name: `classification` and `bbox_regression`, and others of the detector.

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
        """Have `observer` called with the labels of the classification loss, for statistics.

        It receives int64 labels of any shape, once per training batch: `C` is background, -1
        ignored.
        """

    def require_size(self, images: Tensor) -> None:
        """Raise ValueError unless the images have the configuration's size."""
        if tuple(images.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} pixels,"
                f" the detector takes {self.config.image_size}"
            )


class DenseDetector(Detector):
    """A detector whose head classifies every anchor or point.

    Attributes:
        anchors: `[A, 4]`, x1 y1 x2 y2 in input pixels; around points, squares of a stride's side.
        head: Computes outputs from pyramid levels, and losses from outputs.
    """

    anchors: Tensor
    backbone: nn.Module
    head: Any

    @abstractmethod
    def match(self, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Index of each anchor's ground truth, int64 `[A]`: -1 for background, -2 for neither."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The head's outputs by torchvision's names: `cls_logits` `[B, A, C]` and others.

        Raises:
            ValueError: The images have another size.
        """
        self.require_size(images)
        outputs: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return outputs

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses of one batch, as the head computes them."""
        outputs, anchors = self.outputs(images), [self.anchors] * len(targets)
        matches = [self.match(self.anchors, target) for target in targets]
        losses: dict[str, Tensor] = self.head.compute_loss(targets, outputs, anchors, matches)
        return losses

    def labels(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Class of every anchor for these targets, int64 `[B, A]`: `C` background, -1 ignored."""
        matches = [self.match(self.anchors, target) for target in targets]
        return assigned_labels(targets, matches, self.config.num_classes)

    def observe_labels(self, observer: Callable[[Tensor], None]) -> None:
        """Have `observer` called with the label of every anchor, `[B, A]`."""
        self.head.observer = observer
