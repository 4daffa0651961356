"""What a dense head is trained with, and RetinaNet's head with losses over the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead

BETWEEN_THRESHOLDS = -2  # torchvision's Matcher: neither foreground nor background


@dataclass(frozen=True)
class HeadLosses:
    """The two losses of a dense head.

    Attributes:
        classification: Called with logits `[B, A, C]` and labels int64 `[B, A]` (`C` is
            background, negative is ignored); returns a scalar.
        regression: Called with predicted and target deltas `[P, 4]` of the positive anchors;
            returns a scalar.
    """

    classification: nn.Module
    regression: nn.Module


def start_loud(layers: nn.Module) -> None:
    """Draw convolutions for training from scratch: He et al. (2015), before a ReLU.

    torchvision's standard deviation of 0.01 suits pretrained features; from scratch it silences
    the gradient, and under a norm it lets the first steps turn the weights round.
    """
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def assigned_labels(
    targets: list[dict[str, Tensor]], matched_idxs: list[Tensor], num_classes: int
) -> Tensor:
    """Class of every place, int64 `[B, A]`: `num_classes` is background, -1 is ignored.

    Args:
        targets: One dict an image, with `labels` int64 `[N]`.
        matched_idxs: For each image the ground truth of every place, int64 `[A]`: -1 for
            background, `BETWEEN_THRESHOLDS` for neither.
        num_classes: Foreground classes, `C`.
    """
    rows = []
    for target, matches in zip(targets, matched_idxs, strict=True):
        row = torch.full_like(matches, num_classes)
        if len(target["labels"]):
            row = torch.where(matches >= 0, target["labels"][matches.clamp(min=0)], row)
        rows.append(row.masked_fill(matches == BETWEEN_THRESHOLDS, -1))
    return torch.stack(rows)


class HarmonizedRetinaNetHead(RetinaNetHead):  # type: ignore[misc]
    """`RetinaNetHead` whose losses see every anchor of the batch together.

    A gradient density is only meaningful over many samples, so the labels of all images are
    gathered first and each loss is called once. Works inside any torchvision `RetinaNet`:
    `retinanet.head = HarmonizedRetinaNetHead(256, 9, C, losses=...)`.

    Args:
        in_channels: Channels of the pyramid.
        num_anchors: Anchors a location.
        num_classes: Foreground classes, `C`.
        losses: What to train with; None for inference only.
        convs: 3x3 convolutions before each predictor, 1 to 4.

    Attributes:
        observer: Called with the labels `[B, A]` of every training batch, for statistics.
    """

    def __init__(
        self,
        in_channels: int,
        num_anchors: int,
        num_classes: int,
        *,
        losses: HeadLosses | None = None,
        convs: int = 4,
    ) -> None:
        super().__init__(in_channels, num_anchors, num_classes)
        for branch in (self.classification_head, self.regression_head):
            branch.conv = branch.conv[:convs]
            start_loud(branch.conv)
        self.num_classes = num_classes
        self.classification_loss = losses.classification if losses else None
        self.regression_loss = losses.regression if losses else None
        self.observer: Callable[[Tensor], None] | None = None

    def set_prior(self, prior: float) -> None:
        """Start at foreground probability `prior`: bias `-log((1 - prior) / prior)`."""
        nn.init.constant_(self.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Classification over every anchor of the batch, regression over its positives.

        Raises:
            RuntimeError: The head was built without losses.
        """
        if self.classification_loss is None or self.regression_loss is None:
            raise RuntimeError("this head was built without losses; pass losses=HeadLosses(...)")
        labels = self.labels(targets, matched_idxs)
        if self.observer is not None:
            self.observer(labels)
        predicted, expected = self._deltas(targets, head_outputs, anchors, matched_idxs)
        return {
            "classification": self.classification_loss(head_outputs["cls_logits"], labels),
            "bbox_regression": self.regression_loss(predicted, expected),
        }

    def labels(self, targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]) -> Tensor:
        """Class of every anchor, int64 `[B, A]`: `C` is background, -1 is ignored."""
        return assigned_labels(targets, matched_idxs, self.num_classes)

    def _deltas(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        predicted, expected = [], []
        for i, (target, matches) in enumerate(zip(targets, matched_idxs, strict=True)):
            foreground = torch.nonzero(matches >= 0).squeeze(1)
            boxes = target["boxes"][matches[foreground]]
            coder = self.regression_head.box_coder
            expected.append(coder.encode_single(boxes, anchors[i][foreground]))
            predicted.append(head_outputs["bbox_regression"][i, foreground])
        return torch.cat(predicted).float(), torch.cat(expected)
