"""What a dense head is trained with, and RetinaNet's head with losses over the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchvision.models.detection.retinanet import RetinaNetHead

from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.imbalance.cleanliness import cleanliness, paired_iou
from ghm_triton.imbalance.sampling_free import GuidedLoss, prior_bias

BETWEEN_THRESHOLDS = -2  # torchvision's Matcher: neither foreground nor background


@dataclass(frozen=True)
class HeadLosses:
    """The losses of a dense head, or of a two-stage detector's regions.

    Attributes:
        classification: Called with logits `[B, A, C]` and labels int64 `[B, A]` (`C` is
            background, negative is ignored), of regions `[R, S]` and `[R]`; returns a scalar.
        regression: Called with predicted and target deltas `[P, 4]` of the positives; returns a
            scalar.
        of_boxes: Whether the regression takes boxes, x1 y1 x2 y2 in input pixels, for deltas.
        mining: A `HardPlaces`, or a `HardRegions`, that chooses what to learn from. Both losses
            must return sums then, which are divided by what is kept. None learns from all.
        guide: A `GuidedLoss` that scales the classification, or None.
        objectness: Of a proposal network that samples nothing: called with logits `[B * A, 1]`,
            soft labels and label weights of that shape; returns a scalar.
        adversary: Makes what hides and turns the features of regions while a two-stage detector
            learns, given their channels; see `ghm_triton.imbalance.adversarial`.
        process_group: Ranks whose samples the losses count together; for those that a detector
            adds of its own.
        samples: Whether a two-stage detector learns from a sample of its anchors and regions.
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
    """What holds losses, and makes them of what it predicted.

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
        """The losses of what is to be learnt from, mined or not.

        Args:
            logits: What the classification loss takes.
            labels: int64; negative is ignored.
            predicted: `[P, 4]` of the positives, in the order of the labels.
            expected: `[P, 4]`.
            soft: What the classification loss is asked instead of the labels.

        Returns:
            `classification` and `bbox_regression`; of guided losses also `unguided_classification`,
            the classification loss as the guide found it, which carries no gradient: a guided one
            only repeats the regression.

        Raises:
            RuntimeError: It was built without losses.
        """
        if self.classification_loss is None or self.regression_loss is None:
            raise RuntimeError("this head was built without losses; pass losses=HeadLosses(...)")
        classification = self.classification_loss(logits, *(soft or (labels,)))
        regression = self.regression_loss(predicted, expected)
        if self.mining is not None:
            learnt = (labels >= 0).sum().clamp(min=1)
            classification, regression = classification / learnt, regression / learnt
        if self.guide is None:
            return {"classification": classification, "bbox_regression": regression}
        guided = self.guide.terms(classification, regression)
        return {
            "classification": guided.classification,
            "bbox_regression": guided.regression,
            "unguided_classification": classification.detach(),
        }


class LearningHead(Learner):
    """What dense heads have in common: they learn from every place of the batch."""

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
        """Classification over every place of the batch, regression over its positives.

        Args:
            logits: `[B, A, C]`.
            labels: int64 `[B, A]`: `C` is background, -1 is ignored.
            predicted: `[P, 4]` of the positives, in the order of the labels.
            expected: `[P, 4]`.
            soft: Labels `[B, A, C]` and their weight that the classification loss is asked
                instead, as `soft_labels` makes them; without mining.

        Raises:
            RuntimeError: The head was built without losses.
        """
        if self.observer is not None:
            self.observer(labels)
        if self.mining is not None:
            labels, kept = self.mining(logits, labels, predicted, expected)
            predicted, expected = predicted[kept], expected[kept]
        return self.learn(logits, labels, predicted, expected, soft)


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


def soft_labels(logits: Tensor, labels: Tensor, loc: Tensor) -> tuple[Tensor, Tensor]:
    """Cleanliness at the class of each positive, 0 elsewhere; and what of it counts.

    Args:
        logits: `[B, A, C]`.
        labels: int64 `[B, A]`; `C` is background, negative is ignored.
        loc: IoU of each positive's predicted box with its own, `[P]`, in the order of `labels`.

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
        num_anchors: Anchors a location.
        num_classes: Foreground classes, `C`.
        losses: What to train with; None for inference only.
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
        labels = self.labels(targets, matched_idxs)
        predicted, expected = self._positives(targets, head_outputs, anchors, matched_idxs)
        logits, soft = head_outputs["cls_logits"], None
        if self.soft:
            loc = self._overlaps(predicted.detach(), expected, anchors, matched_idxs)
            soft = soft_labels(logits.detach(), labels, loc)
        return self.dense_losses(logits, labels, predicted, expected, soft)

    def _overlaps(
        self,
        predicted: Tensor,
        expected: Tensor,
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> Tensor:
        """IoU of each positive's predicted box with its ground truth, `[P]`."""
        if not self.learns_boxes:
            pairs = zip(anchors, matched_idxs, strict=True)
            own = torch.cat([boxes[matches >= 0] for boxes, matches in pairs])
            coder = self.regression_head.box_coder
            predicted, expected = (coder.decode_single(x, own) for x in (predicted, expected))
        return paired_iou(predicted, expected)

    def labels(self, targets: list[dict[str, Tensor]], matched_idxs: list[Tensor]) -> Tensor:
        """Class of every anchor, int64 `[B, A]`: `C` is background, -1 is ignored."""
        return assigned_labels(targets, matched_idxs, self.num_classes)

    def _positives(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Predicted and true deltas of the positive anchors, or boxes where those are learnt."""
        coder = self.regression_head.box_coder
        predicted, expected = [], []
        for i, (target, matches) in enumerate(zip(targets, matched_idxs, strict=True)):
            foreground = torch.nonzero(matches >= 0).squeeze(1)
            boxes = target["boxes"][matches[foreground]]
            deltas = head_outputs["bbox_regression"][i, foreground].float()
            own = anchors[i][foreground]
            if self.learns_boxes:
                deltas = coder.decode_single(deltas, own)
            else:
                boxes = coder.encode_single(boxes, own)
            expected.append(boxes)
            predicted.append(deltas)
        return torch.cat(predicted), torch.cat(expected)
