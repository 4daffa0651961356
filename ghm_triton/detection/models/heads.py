"""Losses of a detector's heads, and RetinaNet's head with losses over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchvision.models.detection.retinanet import RetinaNetHead

from ghm_triton.detection.models.anchors import assigned_labels
from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.imbalance.cleanliness import cleanliness, paired_iou
from ghm_triton.imbalance.sampling_free import GuidedLoss, prior_bias


@dataclass(frozen=True)
class HeadLosses:
    """The losses of a dense head, or of a two-stage detector's regions.

    Attributes:
        classification: Called with logits `[B, A, C]` and labels int64 `[B, A]` (`C` is
            background, negative is ignored), for regions `[R, S]` and `[R]`; returns a scalar.
        regression: Called with predicted and target deltas `[P, 4]` of the positives; returns a
            scalar.
        of_boxes: Whether the regression takes boxes, x1 y1 x2 y2 in input pixels, for deltas.
        mining: A `HardPlaces` or `HardRegions` that selects the examples to train on. Both losses
            must return sums then, which are divided by the number kept. None trains on all.
        guide: A `GuidedLoss` that scales the classification, or None.
        objectness: Loss of a proposal network that samples nothing: called with logits
            `[B * A, 1]`, soft labels and label weights of that shape; returns a scalar.
        adversary: Builds the adversary of a two-stage detector's regions from their channels; see
            `ghm_triton.imbalance.adversarial`.
        process_group: Ranks whose samples are counted together, for losses that a detector adds.
        samples: Whether a two-stage detector is trained on a sample of its anchors and regions.
    """

    classification: nn.Module
    regression: nn.Module
    of_boxes: bool = False
    mining: nn.Module | None = None
    guide: GuidedLoss | None = None
    objectness: nn.Module | None = None
    adversary: Callable[[int], Adversary] | None = None
    process_group: ProcessGroup | None = None
    samples: bool = True


class Learner(nn.Module):
    """A module that holds `HeadLosses` and computes them.

    Attributes:
        observer: Called with the labels of every training batch, for statistics.
    """

    observer: Callable[[Tensor], None] | None

    def hold(self, losses: HeadLosses | None) -> None:
        """Keep the losses to train with; None for inference only."""
        self.classification_loss = losses.classification if losses else None
        self.regression_loss = losses.regression if losses else None
        self.learns_boxes = losses.of_boxes if losses else False
        self.mining = losses.mining if losses else None
        self.guide = losses.guide if losses else None
        self.observer = None

    def learn(
        self,
        logits: Tensor,
        labels: Tensor,
        predicted: Tensor,
        expected: Tensor,
        soft: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of the examples to train on.

        Args:
            logits: As the classification loss takes them.
            labels: int64; negative is ignored.
            predicted: `[P, 4]` of the positives, in the order of the labels.
            expected: `[P, 4]`.
            soft: Soft labels and label weights for the classification loss instead of `labels`.

        Returns:
            `classification` and `bbox_regression`; with a guide also `unguided_classification`,
            without gradient, because a guided classification only repeats the regression.

        Raises:
            RuntimeError: The module was built without losses.
        """
        if self.classification_loss is None or self.regression_loss is None:
            raise RuntimeError("this head was built without losses; pass losses=HeadLosses(...)")
        classification = self.classification_loss(logits, *(soft or (labels,)))
        regression = self.regression_loss(predicted, expected)
        if self.mining is not None:
            kept = (labels >= 0).sum().clamp(min=1)
            classification, regression = classification / kept, regression / kept
        if self.guide is None:
            return {"classification": classification, "bbox_regression": regression}
        guided = self.guide.terms(classification, regression)
        return {
            "classification": guided.classification,
            "bbox_regression": guided.regression,
            "unguided_classification": classification.detach(),
        }


class LearningHead(Learner):
    """Base of dense heads, whose losses see every anchor or point of the batch."""

    # torchvision's, which is not typed.
    classification_head: Any
    regression_head: Any

    def dense_losses(
        self,
        logits: Tensor,
        labels: Tensor,
        predicted: Tensor,
        expected: Tensor,
        soft: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Classification over every anchor of the batch, regression over its positives.

        Args:
            logits: `[B, A, C]`.
            labels: int64 `[B, A]`: `C` is background, -1 is ignored.
            predicted: `[P, 4]` of the positives, in the order of the labels.
            expected: `[P, 4]`.
            soft: Labels `[B, A, C]` and their weight for the classification loss instead, as
                `soft_labels` returns them; without mining.

        Raises:
            RuntimeError: The head was built without losses.
        """
        if self.observer is not None:
            self.observer(labels)
        if self.mining is not None:
            labels, kept = self.mining(logits, labels, predicted, expected)
            predicted, expected = predicted[kept], expected[kept]
        return self.learn(logits, labels, predicted, expected, soft)


def positive_pairs(
    targets: list[dict[str, Tensor]], anchors: list[Tensor], matched_idxs: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The positive anchors of a batch and their boxes.

    Returns:
        Which anchors are positive, bool `[B, A]`; those anchors `[P, 4]`; their boxes `[P, 4]`.
    """
    positive = torch.stack(matched_idxs) >= 0
    boxes = [t["boxes"][m[m >= 0]] for t, m in zip(targets, matched_idxs, strict=True)]
    return positive, torch.stack(anchors)[positive], torch.cat(boxes)


def start_loud(layers: nn.Module) -> None:
    """Initialise convolutions for training from scratch: He et al. (2015), before a ReLU.

    torchvision's standard deviation of 0.01 suits pretrained features; from scratch it attenuates
    the gradient, and under a norm the first steps turn the weights round.
    """
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


def soft_labels(logits: Tensor, labels: Tensor, loc: Tensor) -> tuple[Tensor, Tensor]:
    """Soft labels: cleanliness at the class of each positive, 0 elsewhere.

    Args:
        logits: `[B, A, C]`.
        labels: int64 `[B, A]`; `C` is background, negative is ignored.
        loc: IoU of each positive's predicted box with its ground truth, `[P]`, in the order of
            `labels`.

    Returns:
        Labels float32 `[B, A, C]` and their weight `[B, A, 1]`: 0 where ignored, else 1.
    """
    target = torch.zeros(logits.shape, device=logits.device)
    image, anchor = torch.nonzero((labels >= 0) & (labels < logits.shape[2]), as_tuple=True)
    where = (image, anchor, labels[image, anchor])
    target[where] = cleanliness(loc.float(), torch.sigmoid(logits[where].float()))
    return target, (labels >= 0).unsqueeze(2).float()


class HarmonizedRetinaNetHead(LearningHead, RetinaNetHead):  # type: ignore[misc]
    """`RetinaNetHead` whose losses see every anchor of the batch together.

    A gradient density is only meaningful over many samples, so the labels of all images are
    gathered first and each loss is called once. Works inside any torchvision `RetinaNet`:
    `retinanet.head = HarmonizedRetinaNetHead(256, 9, C, losses=...)`.

    Args:
        in_channels: Channels of the pyramid.
        num_anchors: Anchors per location.
        num_classes: Foreground classes, `C`.
        losses: The losses to train with; None for inference only.
        convs: 3x3 convolutions before each predictor, 1 to 4.
        soft: Whether a positive's label is its cleanliness instead of 1. The classification loss
            is then called with labels float32 `[B, A, C]` and a label weight `[B, A, 1]`.

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
        soft: bool = False,
    ) -> None:
        super().__init__(in_channels, num_anchors, num_classes)
        for branch in (self.classification_head, self.regression_head):
            branch.conv = branch.conv[:convs]
            start_loud(branch.conv)
        self.num_classes, self.soft = num_classes, soft
        self.hold(losses)

    def set_prior(self, prior: float) -> None:
        """Start at foreground probability `prior`: bias `-log((1 - prior) / prior)`."""
        nn.init.constant_(self.classification_head.cls_logits.bias, prior_bias(prior))

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
        labels = assigned_labels(targets, matched_idxs, self.num_classes)
        predicted, expected, places = self.pairs(targets, head_outputs, anchors, matched_idxs)
        logits, soft = head_outputs["cls_logits"], None
        if self.soft:
            boxes = (predicted.detach(), expected)
            if not self.learns_boxes:
                coder = self.regression_head.box_coder
                boxes = tuple(coder.decode_single(deltas, places) for deltas in boxes)
            soft = soft_labels(logits.detach(), labels, paired_iou(*boxes))
        return self.dense_losses(logits, labels, predicted, expected, soft)

    def pairs(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predicted and target deltas (or boxes) of the positives, and their anchors, `[P, 4]`."""
        positive, places, boxes = positive_pairs(targets, anchors, matched_idxs)
        deltas = head_outputs["bbox_regression"][positive].float()
        coder = self.regression_head.box_coder
        if self.learns_boxes:
            return coder.decode_single(deltas, places), boxes, places
        return deltas, coder.encode_single(boxes, places), places
