"""Region proposal networks: torchvision's, with proposals for a whole batch, and a clean one.

`ProposalNetwork` trains on a sample of the anchors that overlap enough or hardly at all, as
torchvision does, or guided on all of those. `CleanProposalNetwork` trains on every anchor with
its cleanliness as a soft label.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import (
    RegionProposalNetwork,
    RPNHead,
    concat_box_prediction_layers,
)

from ghm_triton.detection.models.anchors import (
    ASPECT_RATIOS,
    BETWEEN_THRESHOLDS,
    level_sizes,
    make_anchors,
    without_ignored,
)
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.heads import start_loud
from ghm_triton.detection.models.losses import SmoothL1
from ghm_triton.detection.models.postprocess import OUT, decode_boxes, suppress
from ghm_triton.imbalance.cleanliness import (
    assign_top_anchors,
    cleanliness,
    paired_iou,
    soft_targets,
)
from ghm_triton.imbalance.sampling_free import GuidedLoss, prior_bias

FOREGROUND_IOU, BACKGROUND_IOU = 0.7, 0.3
SAMPLES, POSITIVE_SHARE = 256, 0.5  # anchors of an image that the losses see
PROPOSALS_IN_TRAINING = 2000
NMS_IOU = 0.7


class ProposalHead(RPNHead):  # type: ignore[misc]
    """`RPNHead` with float32 outputs: half precision has too few bits for pixel coordinates.

    Args:
        channels: Channels of the pyramid.
        convs: 3x3 convolutions before the predictors.
    """

    def __init__(self, channels: int, convs: int) -> None:
        super().__init__(channels, len(ASPECT_RATIOS), convs)
        start_loud(self.conv)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Objectness `[B, a, h, w]` and deltas `[B, 4a, h, w]` of every level."""
        objectness, deltas = super().forward(features)
        return [x.float() for x in objectness], [x.float() for x in deltas]


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's sampled RPN on images of one fixed size.

    Its training is torchvision's, except that ignored boxes are neither object nor background;
    for another assignment or loss, override `assign_targets_to_anchors` or `compute_loss`.

    A guided one samples nothing (arXiv 1909.04868): the objectness is a cross entropy over every
    anchor that is not ignored, scaled to the box loss, which is a mean over the positives.
    torchvision divides the box loss of a sample by the sample's size, positive or not, so a scale
    derived from it would depend on the number of positives rather than on their boxes.

    Args:
        channels: Channels of the pyramid.
        strides: Strides of its levels, finest first.
        config: The detector's description.
        guide: Scales the objectness loss to the box loss; None samples.
        process_group: Ranks whose positives are counted together, where none are sampled.

    Attributes:
        samples: Whether only a sample of the anchors is trained on.
    """

    anchors: Tensor
    same_level: Tensor

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        config: DetectorConfig,
        guide: GuidedLoss | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        sizes = tuple((config.anchor_scale * s,) for s in strides)
        super().__init__(
            AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
            ProposalHead(channels, config.head_convs),
            FOREGROUND_IOU,
            BACKGROUND_IOU,
            SAMPLES,
            POSITIVE_SHARE,
            {"training": PROPOSALS_IN_TRAINING, "testing": config.candidates},
            {"training": PROPOSALS_IN_TRAINING, "testing": config.proposals},
            NMS_IOU,
        )
        self.config = config
        self.guide = guide
        self.box_loss = SmoothL1(process_group=process_group)
        self.samples = guide is None
        self.level_anchors = [
            len(ASPECT_RATIOS) * h * w for h, w in level_sizes(config.image_size, strides)
        ]
        counts = torch.tensor(self.level_anchors).clamp(max=config.candidates)
        levels = torch.arange(len(strides))
        same_level = levels[:, None] == levels.repeat_interleave(counts)
        anchors = make_anchors(self.anchor_generator, config.image_size, strides)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("same_level", same_level, persistent=False)

    def propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The proposals of a batch, without a loop over its images.

        The best anchors of each level are decoded, NMS is applied within each level, and the best
        of all levels are kept: torchvision's `filter_proposals` in evaluation mode, ranked by
        logit.

        Args:
            features: Pyramid levels `[B, channels, h, w]`, finest first.

        Returns:
            Boxes `[B, K, 4]` in input pixels, padded with zeros, and whether each is a proposal,
            bool `[B, K]`.
        """
        objectness, deltas = concat_box_prediction_layers(*self.head(features))
        batch = features[0].shape[0]
        ranks, deltas = objectness.reshape(batch, -1), deltas.reshape(batch, -1, 4)
        best, start = [], 0
        for level in ranks.split(self.level_anchors, dim=1):
            count = min(self.config.candidates, level.shape[1])
            best.append(level.topk(count, dim=1).indices + start)
            start += level.shape[1]
        picked = torch.cat(best, dim=1)
        image = torch.arange(batch, device=picked.device).unsqueeze(1)
        boxes = decode_boxes(deltas[image, picked], self.anchors[picked], self.config.image_size)
        solid = (boxes[..., 2:] - boxes[..., :2]).amin(dim=2) >= self.min_size
        # NMS treats a level as a class; entries of other levels are excluded.
        eligible = solid.unsqueeze(1) & self.same_level
        ranks = torch.where(eligible, ranks[image, picked].unsqueeze(1), OUT)
        iou = torch.full((1,), self.nms_thresh, device=ranks.device)
        most = min(self.config.proposals, picked.shape[1])
        proposals, _, levels, _ = suppress(boxes.unsqueeze(1), ranks, ranks, iou, most)
        return proposals, levels >= 0

    def start_at(self, prior: float) -> None:
        """Start at objectness `prior`: bias `-log(1 / prior - 1)`."""
        nn.init.constant_(self.head.cls_logits.bias, prior_bias(prior))

    def labels(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Label of every anchor, int64 `[B, A]`: 0 an object, 1 background, -1 ignored.

        Where anchors are sampled, those that are not drawn are ignored.
        """
        rows, _ = self.assign_targets_to_anchors([self.anchors] * len(targets), targets)
        labels = torch.stack(rows).long()
        if self.samples:
            drawn = [torch.stack(kind) for kind in self.fg_bg_sampler(rows)]
            labels = labels.masked_fill(~(drawn[0].bool() | drawn[1].bool()), -1)
        return torch.where(labels < 0, labels, 1 - labels)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals and, in training, their losses, as torchvision names them.

        Guided losses come with `unguided_objectness`, the objectness before it is scaled, without
        gradient.
        """
        proposals, losses = super().forward(images, features, targets)
        if self.guide is not None and losses:
            objectness = losses["loss_objectness"]
            guided = self.guide.terms(objectness, losses["loss_rpn_box_reg"])
            losses = {
                "loss_objectness": guided.classification,
                "loss_rpn_box_reg": guided.regression,
                "unguided_objectness": objectness.detach(),
            }
        return proposals, losses

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Torchvision's losses over a sample of the anchors, or losses over all, to be guided.

        Args:
            objectness: Logits `[B * A, 1]`.
            pred_bbox_deltas: `[B * A, 4]`.
            labels: Per image 1, 0 or -1, `[A]`.
            regression_targets: Per image `[A, 4]`; those of positives are read.
        """
        if self.samples:
            sampled: tuple[Tensor, Tensor] = super().compute_loss(
                objectness, pred_bbox_deltas, labels, regression_targets
            )
            return sampled
        label = torch.cat(labels)
        counted, positive = label >= 0, label == 1
        entries = nn.functional.binary_cross_entropy_with_logits(
            objectness.squeeze(1)[counted], label[counted], reduction="sum"
        )
        expected = torch.cat(regression_targets)[positive]
        box_loss = self.box_loss(pred_bbox_deltas[positive], expected)
        return entries / counted.sum().clamp(min=1), box_loss

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Which anchors are objects (1), background (0) or neither (-1), and their boxes."""
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        for row, places, target in zip(labels, anchors, targets, strict=True):
            if "ignore" in target and bool(target["ignore"].any()):
                nearest = self.box_similarity(target["boxes"], places).argmax(dim=0)
                row[(row == 1) & target["ignore"][nearest]] = -1
        return labels, boxes


class CleanProposalNetwork(ProposalNetwork):
    """An RPN that trains on every anchor, with its cleanliness as a soft label.

    The `N = 100` anchors of a ground truth with the highest IoU are its positives, all others
    negatives. A positive's label is its cleanliness `c = 0.5 * loc + 0.5 * cls` (arXiv
    1912.05086), with `loc` the IoU of its predicted box and `cls` its predicted objectness; a
    negative's is 0. `L_cls` is a loss over all anchors of the batch, such as GHM-C (arXiv
    1811.05181); `L_reg` is smooth L1 over the positives, divided by their number. Losses are not
    weighted by cleanliness, since harmonizing weights them already.

    Args:
        channels: Channels of the pyramid.
        strides: Strides of its levels, finest first.
        config: The detector's description.
        classification_loss: Called with logits `[B * A, 1]`, soft labels and label weights of
            that shape; None for a network that will not be trained.
        guide: Scales the objectness loss to the box loss, or None.
        process_group: Ranks whose positives are counted together.
    """

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        config: DetectorConfig,
        classification_loss: nn.Module | None = None,
        guide: GuidedLoss | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__(channels, strides, config, guide, process_group)
        self.samples = False
        self.classification_loss = classification_loss
        self.start_at(config.prior)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Which anchors are objects (1), background (0) or neither (-1), and their boxes."""
        labels, matched = [], []
        for places, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            matches = without_ignored(assign_top_anchors(boxes, places), target)
            row = (matches >= 0).float().masked_fill(matches == BETWEEN_THRESHOLDS, -1)
            labels.append(row)
            empty = torch.zeros_like(places)
            matched.append(boxes[matches.clamp(min=0)] if len(boxes) else empty)
        return labels, matched

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Objectness over every anchor that is not ignored, boxes over the positives.

        Arguments as in `ProposalNetwork.compute_loss`.

        Raises:
            RuntimeError: The network was built without a loss.
        """
        if self.classification_loss is None:
            raise RuntimeError("this proposal network was built without a loss")
        label = torch.cat(labels)
        positive = label == 1
        predicted, expected = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        with torch.no_grad():
            places = self.anchors.repeat(len(labels), 1)[positive]
            boxes, truth = (self.box_coder.decode_single(x, places) for x in (predicted, expected))
            scores = torch.sigmoid(objectness[positive].squeeze(1))
            target = soft_targets(positive, cleanliness(paired_iou(boxes, truth), scores))
        counted = (label >= 0).float().unsqueeze(1)
        return (
            self.classification_loss(objectness, target.unsqueeze(1), counted),
            self.box_loss(predicted, expected),
        )
