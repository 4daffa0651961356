"""FCOS: torchvision's, without anchors, with a classification loss that sees the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from ghm_triton.detection.models.anchors import level_sizes, make_anchors
from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector, Predictions
from ghm_triton.detection.models.heads import (
    BETWEEN_THRESHOLDS,
    HeadLosses,
    LearningHead,
    assigned_labels,
    start_loud,
)
from ghm_triton.detection.models.losses import Centerness
from ghm_triton.detection.models.postprocess import clip_boxes

CHANNELS_A_GROUP = 8  # of the head's group norms: 32 groups of 256 channels, as torchvision's
SMALLEST_REACH = 4.0  # in strides: a level's objects reach from this to twice as far from a point
MAX_LOGIT = 40.0  # beyond it exp() would overflow in a product of two; scores below 1e-8


class HarmonizedFCOSHead(LearningHead, FCOSHead):  # type: ignore[misc]
    """`FCOSHead` whose losses see every point of the batch together.

    Works inside any torchvision `FCOS`: `fcos.head = HarmonizedFCOSHead(256, C, losses=...)`.

    Args:
        in_channels: Channels of the pyramid, a multiple of 8.
        num_classes: Foreground classes, `C`.
        losses: What to train with; None for inference only. The regression is called with
            predicted and true boxes `[P, 4]` of the positive points, not with deltas.
        convs: 3x3 convolutions before each predictor, 1 to 4.
        prior: Foreground probability at the start.
        group_norm: Whether a norm follows each convolution, as in torchvision's.
    """

    box_coder: BoxLinearCoder

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        losses: HeadLosses | None = None,
        convs: int = 4,
        prior: float = 0.01,
        group_norm: bool = True,
    ) -> None:
        nn.Module.__init__(self)  # torchvision's own insists on 32 groups
        norm = partial(nn.GroupNorm, in_channels // CHANNELS_A_GROUP) if group_norm else _no_norm
        self.box_coder = BoxLinearCoder(normalize_by_size=True)
        self.classification_head = FCOSClassificationHead(
            in_channels, 1, num_classes, convs, prior, norm
        )
        self.regression_head = FCOSRegressionHead(in_channels, 1, convs, norm)
        for branch in (self.classification_head, self.regression_head):
            start_loud(branch.conv)
        self.num_classes = num_classes
        self.centre_loss = Centerness(process_group=losses.process_group if losses else None)
        self.hold(losses)

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Classification over every point of the batch, boxes and centerness over its positives.

        Raises:
            RuntimeError: The head was built without losses.
        """
        labels = assigned_labels(targets, matched_idxs, self.num_classes)
        positive = [matches >= 0 for matches in matched_idxs]
        points = torch.cat([a[own] for a, own in zip(anchors, positive, strict=True)])
        matches = zip(targets, matched_idxs, positive, strict=True)
        boxes = torch.cat([target["boxes"][match[own]] for target, match, own in matches])
        own = torch.stack(positive)
        codes = head_outputs["bbox_regression"][own].float()
        centre = head_outputs["bbox_ctrness"][own].squeeze(1).float()
        goal = centerness(self.box_coder.encode(points, boxes))
        predicted = self.box_coder.decode(codes, points)
        losses = self.dense_losses(head_outputs["cls_logits"], labels, predicted, boxes)
        return {**losses, "bbox_ctrness": self.centre_loss(centre, goal)}


class FCOSDetector(Detector, FCOS):  # type: ignore[misc]
    """`torchvision.models.detection.FCOS` on images of one fixed, letterboxed size.

    The head's layers and box coding are torchvision's; its rule of which point learns which box
    is written anew, because torchvision's knows no boxes to be ignored.

    Args:
        config: What to build.
        losses: The head's losses; None for a detector that will not be trained.
    """

    anchors: Tensor
    backbone: nn.Module
    head: HarmonizedFCOSHead
    center_sampling_radius: float

    def __init__(self, config: DetectorConfig, losses: HeadLosses | None = None) -> None:
        backbone, strides = build_backbone(config)
        generator = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
        head = HarmonizedFCOSHead(
            int(backbone.out_channels),  # type: ignore[arg-type]
            config.num_classes,
            losses=losses,
            convs=config.head_convs,
            prior=config.prior,
            # From scratch and in few steps a head without it learns half as much again.
            group_norm=config.backbone != "tiny",
        )
        super().__init__(backbone, config.num_classes, anchor_generator=generator, head=head)
        self.config = config
        self.level_points = [h * w for h, w in level_sizes(config.image_size, strides)]
        anchors = make_anchors(generator, config.image_size, strides)
        self.register_buffer("anchors", anchors, persistent=False)

    def raw(self, images: Tensor) -> dict[str, Tensor]:
        """`cls_logits` `[B, A, C]`, `bbox_regression` `[B, A, 4]`, `bbox_ctrness` `[B, A, 1]`."""
        self.require_size(images)
        outputs: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return outputs

    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every point; the score is `sqrt(class * centerness)`."""
        outputs = {name: output.float() for name, output in self.raw(images).items()}
        logits, centre = outputs["cls_logits"], outputs["bbox_ctrness"]
        scores = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(centre))
        boxes = decode_sides(outputs["bbox_regression"], self.anchors, self.config.image_size)
        return Predictions(boxes.unsqueeze(2), scores, joint_logits(logits, centre))

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses: `classification`, `bbox_regression` and `bbox_ctrness`."""
        anchors = [self.anchors] * len(targets)
        return self.compute_loss(targets, self.raw(images), anchors, self.level_points)

    def observe_labels(self, observer: Callable[[Tensor], None]) -> None:
        """Have `observer` called with the label of every point, `[B, A]`."""
        self.head.observer = observer

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Match points to ground truth, then ask the head for its losses."""
        matches = [
            self.match(points, target, num_anchors_per_level)
            for points, target in zip(anchors, targets, strict=True)
        ]
        return self.head.compute_loss(targets, head_outputs, anchors, matches)

    def labels(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Class of every point for these targets, int64 `[B, A]`: `C` background, -1 ignored."""
        matches = [self.match(self.anchors, target, self.level_points) for target in targets]
        return assigned_labels(targets, matches, self.config.num_classes)

    def match(self, points: Tensor, target: dict[str, Tensor], level_points: list[int]) -> Tensor:
        """Index of each point's ground truth, -1 for background, -2 for neither. `[A]`.

        A point learns the smallest of the boxes that it lies in, near whose centre it lies, and
        whose farthest side its level is to reach.

        Args:
            points: Squares of a stride's side around the points, `[A, 4]`.
            target: `boxes` `[N, 4]` and optionally `ignore` bool `[N]`.
            level_points: Points of every level, finest first.
        """
        boxes = target["boxes"]
        if not len(boxes):
            return points.new_full((len(points),), -1, dtype=torch.int64)
        centre, stride = (
            (points[:, None, :2] + points[:, None, 2:]) / 2,
            points[:, 2] - points[:, 0],
        )
        sides = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], dim=2)
        off_centre = (centre - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=2)
        near = off_centre < self.center_sampling_radius * stride[:, None]
        least, most = SMALLEST_REACH * stride, 2 * SMALLEST_REACH * stride
        least[: level_points[0]], most[-level_points[-1] :] = 0.0, torch.inf
        reach = sides.amax(dim=2)
        fits = (reach > least[:, None]) & (reach < most[:, None])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        allowed = near & (sides.amin(dim=2) > 0) & fits
        smallest, index = torch.where(allowed, area, torch.inf).min(dim=1)
        matches = index.masked_fill(smallest.isinf(), -1)
        if "ignore" in target:
            hidden = (matches >= 0) & target["ignore"][matches.clamp(min=0)]
            matches = matches.masked_fill(hidden, BETWEEN_THRESHOLDS)
        return matches


def _no_norm(channels: int) -> nn.Module:
    del channels
    return nn.Identity()


def centerness(sides: Tensor) -> Tensor:
    """How central a point lies in its box, `[P]` in (0, 1]; 1 in the middle, 0 at a side.

    Args:
        sides: Distances to the left, top, right and bottom side, `[P, 4]`, positive.
    """
    across, down = sides[:, 0::2], sides[:, 1::2]
    nearest, farthest = (torch.stack([f(across, 1), f(down, 1)]) for f in (torch.amin, torch.amax))
    return (nearest / farthest).prod(dim=0).sqrt()


def decode_sides(codes: Tensor, points: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes around points, clipped to the image.

    Args:
        codes: Distances to the left, top, right and bottom side in strides, `[..., A, 4]`.
        points: Squares of a stride's side around the points, `[A, 4]`.
        image_size: `(height, width)`.

    Returns:
        `[..., A, 4]`, x1 y1 x2 y2 in pixels. Equal to torchvision's `BoxLinearCoder` followed by
        `clip_boxes_to_image`, in operations that export with a dynamic batch.
    """
    centre, stride = (points[:, :2] + points[:, 2:]) / 2, points[:, 2:] - points[:, :2]
    corners = [centre - codes[..., :2] * stride, centre + codes[..., 2:] * stride]
    return clip_boxes(torch.cat(corners, dim=-1), image_size)


def joint_logits(a: Tensor, b: Tensor) -> Tensor:
    """The logit of `sigmoid(a) * sigmoid(b)`, without the rounding of that product near 1.

    `1/p - 1 = (1 + exp(-a)) (1 + exp(-b)) - 1`, multiplied out.
    """
    x, y = (torch.exp(-logit.clamp(-MAX_LOGIT, MAX_LOGIT)) for logit in (a, b))
    return -torch.log(x + y + x * y)
