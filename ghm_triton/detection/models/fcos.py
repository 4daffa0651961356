"""FCOS: torchvision's, without anchors, with a classification loss that sees the whole batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead

from ghm_triton.detection.models.anchors import (
    assigned_labels,
    level_sizes,
    make_anchors,
    without_ignored,
)
from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import DenseDetector, Predictions
from ghm_triton.detection.models.heads import (
    HeadLosses,
    LearningHead,
    positive_pairs,
    start_loud,
)
from ghm_triton.detection.models.losses import Centerness
from ghm_triton.detection.models.postprocess import clip_boxes

CHANNELS_PER_GROUP = 8  # of group norms: 256 channels have 32 groups, as in torchvision
SMALLEST_REACH = 4.0  # least distance of a level's farthest sides, in strides; most is twice that
MAX_LOGIT = 40.0  # beyond it exp() would overflow in a product of two; scores below 1e-8


class HarmonizedFCOSHead(LearningHead, FCOSHead):  # type: ignore[misc]
    """`FCOSHead` whose losses see every point of the batch together.

    Works inside any torchvision `FCOS`: `fcos.head = HarmonizedFCOSHead(256, C, losses=...)`.

    Args:
        in_channels: Channels of the pyramid, a multiple of 8.
        num_classes: Foreground classes, `C`.
        losses: The losses to train with; None for inference only. The regression is called with
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
        nn.Module.__init__(self)  # torchvision's requires 32 groups
        norm = partial(nn.GroupNorm, in_channels // CHANNELS_PER_GROUP) if group_norm else _no_norm
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
        positive, points, boxes = positive_pairs(targets, anchors, matched_idxs)
        codes = head_outputs["bbox_regression"][positive].float()
        logits = head_outputs["bbox_ctrness"][positive].squeeze(1).float()
        expected = centerness(self.box_coder.encode(points, boxes))
        predicted = self.box_coder.decode(codes, points)
        losses = self.dense_losses(head_outputs["cls_logits"], labels, predicted, boxes)
        return {**losses, "bbox_ctrness": self.centre_loss(logits, expected)}


class FCOSDetector(DenseDetector, FCOS):  # type: ignore[misc]
    """`torchvision.models.detection.FCOS` on images of one fixed, letterboxed size.

    The head's layers and box coding are torchvision's; the rule that assigns points to boxes is
    implemented here, because torchvision's has no boxes to be ignored.

    Args:
        config: The detector's description.
        losses: The head's losses; None for a detector that will not be trained.
    """

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
            # A head trained from scratch for few steps converges faster without it.
            group_norm=config.backbone != "tiny",
        )
        FCOS.__init__(self, backbone, config.num_classes, anchor_generator=generator, head=head)
        self.config = config
        self.level_points = [h * w for h, w in level_sizes(config.image_size, strides)]
        anchors = make_anchors(generator, config.image_size, strides)
        self.register_buffer("anchors", anchors, persistent=False)

    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every point; the score is `sqrt(class * centerness)`."""
        outputs = {name: output.float() for name, output in self.outputs(images).items()}
        logits, centre = outputs["cls_logits"], outputs["bbox_ctrness"]
        scores = torch.sqrt(torch.sigmoid(logits) * torch.sigmoid(centre))
        boxes = decode_sides(outputs["bbox_regression"], self.anchors, self.config.image_size)
        return Predictions(boxes.unsqueeze(2), scores, joint_logits(logits, centre))

    def match(self, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Index of each point's ground truth, int64 `[A]`: -1 for background, -2 for neither.

        A point is assigned to the smallest of the boxes that contain it, near whose centre it
        lies, and whose farthest side is within the range of its level.
        """
        boxes = target["boxes"]
        if not len(boxes):
            return torch.full_like(anchors[:, 0], -1, dtype=torch.int64)
        centre = (anchors[:, None, :2] + anchors[:, None, 2:]) / 2
        stride = anchors[:, 2] - anchors[:, 0]
        sides = torch.cat([centre - boxes[:, :2], boxes[:, 2:] - centre], dim=2)
        off_centre = (centre - (boxes[:, :2] + boxes[:, 2:]) / 2).abs().amax(dim=2)
        near = off_centre < self.center_sampling_radius * stride[:, None]
        least, most = SMALLEST_REACH * stride, 2 * SMALLEST_REACH * stride
        least[: self.level_points[0]], most[-self.level_points[-1] :] = 0.0, torch.inf
        reach = sides.amax(dim=2)
        in_range = (reach > least[:, None]) & (reach < most[:, None])
        area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
        allowed = near & (sides.amin(dim=2) > 0) & in_range
        smallest, index = torch.where(allowed, area, torch.inf).min(dim=1)
        return without_ignored(index.masked_fill(smallest.isinf(), -1), target)


def _no_norm(channels: int) -> nn.Module:
    del channels
    return nn.Identity()


def centerness(sides: Tensor) -> Tensor:
    """Centerness of points in their boxes, `[P]` in (0, 1]; 1 in the middle, 0 at a side.

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
