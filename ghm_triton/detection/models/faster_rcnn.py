"""Faster R-CNN: torchvision's, with losses that see all regions of the batch at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, roi_align

from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector, Predictions
from ghm_triton.detection.models.heads import HeadLosses, Learner
from ghm_triton.detection.models.postprocess import OUT, decode_boxes
from ghm_triton.detection.models.rpn import CleanProposalNetwork, ProposalNetwork
from ghm_triton.imbalance.sampling_free import GuidedLoss, prior_bias

COARSEST_STRIDE = 32  # of the levels that regions are pooled from
CELLS, SAMPLES_PER_CELL = 7, 2
WIDTH = 4  # of the two hidden layers, in channels: 1024 for 256, as in torchvision
REGION_IOU, POSITIVE_SHARE = 0.5, 0.25
# torchvision's names of the proposals' losses, and ours.
RPN_LOSSES = {
    "loss_objectness": "rpn_objectness",
    "loss_rpn_box_reg": "rpn_box",
    "unguided_objectness": "unguided_rpn_objectness",
}
SMALLEST_SIDE = 0.01  # pixels: torchvision drops thinner boxes


class FasterRCNNDetector(Learner, Detector):
    """Faster R-CNN on images of one fixed, letterboxed size.

    Built of torchvision's proposal network, RoIAlign and box head, under the names that its
    `FasterRCNN` gives them, so that a softmax detector's weights are a torchvision model's.

    A softmax classifier has background as its first class; sigmoids have none. Every class has
    its own box.

    The losses determine the training examples. By default they are torchvision's: per image
    `region_samples` regions, up to a quarter of them positive, and a sample of anchors. With
    `mining` (arXiv 1604.03540, 1705.02233) every region is classified without gradient, and the
    hardest are trained on. A `guide` scales the regions' classification loss to their regression
    loss. Without `samples` (arXiv 1909.04868) every anchor is trained on, and every region unless
    mining selects some, and the proposals are guided too; the released code doubles the regions'
    classification then, as a guide of `cls_weight=2` does. An adversary changes the selected
    positives.

    Args:
        config: The detector's description.
        losses: The region head's losses, and its adversary if there is one; None for a detector
            that will not be trained. The proposal network's are torchvision's (or guided, of every
            anchor), unless the configuration's `assigner` is `cleanliness`, which takes
            `losses.objectness`.
    """

    roi_heads: RoIHeads
    rpn: ProposalNetwork

    def __init__(self, config: DetectorConfig, losses: HeadLosses | None = None) -> None:
        super().__init__()
        self.config = config
        self.backbone, strides = build_backbone(config)
        channels = int(self.backbone.out_channels)  # type: ignore[arg-type]
        self.pooled_strides = [s for s in strides if s <= COARSEST_STRIDE]
        self.background = int(config.classifier == "softmax")  # outputs before the first class
        group = losses.process_group if losses else None
        samples = losses.samples if losses else True
        guide = None if samples else GuidedLoss(process_group=group)
        if config.assigner == "cleanliness":
            objectness = losses.objectness if losses else None
            self.rpn = CleanProposalNetwork(channels, strides, config, objectness, guide, group)
        else:
            self.rpn = ProposalNetwork(channels, strides, config, guide, group)
        predictor = FastRCNNPredictor(WIDTH * channels, self.background + config.num_classes)
        if not self.background:
            nn.init.constant_(predictor.cls_score.bias, prior_bias(config.prior))
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(
                [str(level) for level in range(len(self.pooled_strides))], CELLS, SAMPLES_PER_CELL
            ),
            TwoMLPHead(channels * CELLS**2, WIDTH * channels),
            predictor,
            REGION_IOU,
            REGION_IOU,
            config.region_samples,
            POSITIVE_SHARE,
            None,
            0.0,
            config.iou_threshold,
            config.max_detections,
        )
        self.hold(losses)
        if self.mining is not None or not samples:
            self.roi_heads.fg_bg_sampler = every_region
        # Last, so that the detector's random weights do not depend on it.
        self.adversary = losses.adversary(channels) if losses and losses.adversary else None

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Pyramid levels `[B, channels, h, w]` under the names `0`, `1`, ..., finest first."""
        self.require_size(images)
        return {str(level): x for level, x in enumerate(self.backbone(images).values())}

    def classify(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled regions `[R, channels, 7, 7]` to logits `[R, S]` and deltas `[R, C, 4]`.

        `S` is `C`, or for a softmax `1 + C`.
        """
        logits, deltas = self.roi_heads.box_predictor(self.roi_heads.box_head(pooled))
        return logits, deltas.reshape(deltas.shape[0], -1, 4)[:, self.background :]

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses: the regions', and `rpn_objectness` and `rpn_box` of the proposals.

        With an adversary, also its loss `adversary`. Guided losses come with
        `unguided_classification` and `unguided_rpn_objectness`, without gradient.

        Raises:
            RuntimeError: The detector was built without losses, or is in evaluation mode, where
                torchvision's proposal network has no losses.
        """
        if self.classification_loss is None or self.regression_loss is None:
            raise RuntimeError("this detector was built without losses; pass HeadLosses(...)")
        if not self.training:
            raise RuntimeError("this detector has losses in training mode only; call train()")
        features, sizes = self.features(images), [self.config.image_size] * len(images)
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), features, targets)
        regions, labels, expected = self._training_regions(features, proposals, targets)
        pooled = self.roi_heads.box_roi_pool(features, regions, sizes)
        positive = torch.nonzero(labels < self.config.num_classes).squeeze(1)
        adversarial = {}
        if self.adversary is not None:
            harder, adversarial["adversary"] = self.adversary(
                pooled[positive], partial(self._true_probability, labels=labels[positive])
            )
            pooled = pooled.index_put((positive,), harder)
        logits, deltas = self.classify(pooled)
        predicted = deltas[positive, labels[positive]].float()
        return {
            **self.learn(logits, labels, predicted, expected[positive]),
            **{RPN_LOSSES[name]: loss for name, loss in rpn_losses.items()},
            **adversarial,
        }

    def _training_regions(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        targets: list[dict[str, Tensor]],
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The regions to train on, per image, and the labels and target deltas of all."""
        regions, _, numbers, expected = self.roi_heads.select_training_samples(
            proposals, [_background_first(target) for target in targets]
        )
        classes = self.config.num_classes
        labels = [torch.where(row > 0, row - 1, classes) for row in numbers]
        if self.observer is not None:
            self.observer(torch.cat(labels))
        if self.mining is not None:
            kept = self._hardest(features, regions, labels, expected)
            regions, labels, expected = (
                [row[mask] for row, mask in zip(rows, kept, strict=True)]
                for rows in (regions, labels, expected)
            )
        return regions, torch.cat(labels), torch.cat(expected)

    @torch.no_grad()
    def _hardest(
        self,
        features: dict[str, Tensor],
        regions: list[Tensor],
        labels: list[Tensor],
        expected: list[Tensor],
    ) -> list[Tensor]:
        """Which regions of each image mining keeps, bool `[R]`; image by image, to save memory."""
        mining: Any = self.mining  # a HardRegions
        lost = []
        for image, (boxes, row, deltas) in enumerate(zip(regions, labels, expected, strict=True)):
            levels = {name: level[image : image + 1] for name, level in features.items()}
            pooled = self.roi_heads.box_roi_pool(levels, [boxes], [self.config.image_size])
            logits, predicted = self._look(pooled)
            positive = row < self.config.num_classes
            boxed = predicted[positive, row[positive]].float()
            lost.append(mining.lost(logits, row, positive, boxed, deltas[positive]))
        kept: list[Tensor] = mining(lost, regions)
        return kept

    @torch.no_grad()
    def _look(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """`classify` without gradient.

        Older PyTorch's autocast would cache the weights rounded here, which have no gradient, and
        reuse them in the pass that is trained on.
        """
        kind = pooled.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            return self.classify(pooled)

    def _true_probability(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Predicted probability of each positive region's true class, `[R]` in [0, 1]."""
        logits, _ = self._look(pooled)
        scores = torch.softmax(logits, 1) if self.background else torch.sigmoid(logits)
        return scores.gather(1, (labels + self.background).unsqueeze(1)).squeeze(1).float()

    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every proposal; every class has a box of its own."""
        features = self.features(images)
        proposals, exist = self.rpn.propose(list(features.values()))
        logits, deltas = self.classify(self.pool(features, proposals, exist))
        logits = logits.float().reshape(*exist.shape, -1)
        deltas = deltas.float().reshape(*exist.shape, -1, 4)
        weights = torch.tensor(self.roi_heads.box_coder.weights, device=deltas.device)
        boxes = decode_boxes(deltas / weights, proposals.unsqueeze(2), self.config.image_size)
        if self.background:
            scores, ranks = torch.softmax(logits, dim=2)[..., 1:], softmax_logits(logits)[..., 1:]
        else:
            scores, ranks = torch.sigmoid(logits), logits
        # Padding has no area.
        solid = (boxes[..., 2:] - boxes[..., :2]).amin(dim=3) >= SMALLEST_SIDE
        return Predictions(boxes, torch.where(solid, scores, 0.0), torch.where(solid, ranks, OUT))

    def pool(self, features: dict[str, Tensor], proposals: Tensor, exist: Tensor) -> Tensor:
        """RoIAlign of every proposal on its level of the pyramid, without a loop over the batch.

        Args:
            features: As `features` gives them.
            proposals: `[B, K, 4]` in input pixels.
            exist: bool `[B, K]`.

        Returns:
            `[B * K, channels, 7, 7]`, as torchvision's `MultiScaleRoIAlign`; 0 for no proposal.
        """
        batch, count = exist.shape
        image = torch.arange(batch, device=proposals.device).to(proposals.dtype)
        owner = image.view(-1, 1, 1).expand(batch, count, 1)
        regions = torch.cat([owner, proposals], dim=2).flatten(0, 1)
        levels = torch.where(exist.flatten(), self.pyramid_levels(regions[:, 1:]), -1)
        channels = features["0"].shape[1]
        pooled = regions.new_zeros(batch * count, channels, CELLS, CELLS)
        for level, stride in enumerate(self.pooled_strides):
            here = torch.nonzero(levels == level).squeeze(1)
            level_features = features[str(level)].to(regions.dtype)
            cells = roi_align(level_features, regions[here], CELLS, 1 / stride, SAMPLES_PER_CELL)
            pooled = pooled.index_put((here,), cells)
        return pooled

    def pyramid_levels(self, boxes: Tensor) -> Tensor:
        """Which level boxes `[R, 4]` are pooled from, int64 `[R]`.

        The formula of the FPN paper, `floor(4 + log2(sqrt(area) / 224))`, in comparisons, which
        every runtime rounds alike.
        """
        pooler = self.roi_heads.box_roi_pool
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        level = torch.zeros_like(area, dtype=torch.int64)
        for stride in self.pooled_strides[1:]:
            # torchvision's mapper adds 1e-6, so that rounding does not move 224 itself.
            growth = 2 ** (math.log2(stride) - pooler.canonical_level - 1e-6)
            level = level + (area >= (pooler.canonical_scale * growth) ** 2)
        return level

    def observe_labels(self, observer: Callable[[Tensor], None]) -> None:
        """Have `observer` called with the label of every region, `[R]`, before mining chooses."""
        self.observer = observer


def every_region(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Replace torchvision's sampler: all positives and all negatives, as masks `[R]`."""
    return [row > 0 for row in labels], [row == 0 for row in labels]


def softmax_logits(logits: Tensor) -> Tensor:
    """`log(p / (1 - p))` of every class of a softmax, without the rounding of `p` near 1.

    Args:
        logits: `[..., S]`, of two classes or more.
    """
    classes = torch.arange(logits.shape[-1], device=logits.device)
    best = classes == logits.argmax(dim=-1, keepdim=True)
    # 1 - p of the best class is the share of the others ...
    others = logits.masked_fill(best, OUT)
    most = others.amax(dim=-1, keepdim=True)
    against = most + torch.log(torch.exp(others - most).sum(dim=-1, keepdim=True))
    # ... and p of any other is at most a half.
    log_p = torch.log_softmax(logits, dim=-1)
    return torch.where(best, logits - against, log_p - torch.log(1 - torch.exp(log_p)))


def _background_first(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """A target for torchvision's region head: 0 is background, -1 is never sampled."""
    labels = target["labels"] + 1
    if "ignore" in target:
        labels = labels.masked_fill(target["ignore"], -1)
    return {"boxes": target["boxes"], "labels": labels}
