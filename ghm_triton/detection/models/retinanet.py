"""RetinaNet: torchvision's, with losses that see the whole batch at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from ghm_triton.detection.models.anchors import ASPECT_RATIOS, make_anchors, without_ignored
from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import DenseDetector, Predictions
from ghm_triton.detection.models.heads import HarmonizedRetinaNetHead, HeadLosses
from ghm_triton.detection.models.postprocess import decode_boxes
from ghm_triton.imbalance.cleanliness import assign_top_anchors

OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class RetinaNetDetector(DenseDetector, RetinaNet):  # type: ignore[misc]
    """`torchvision.models.detection.RetinaNet` on images of one fixed, letterboxed size.

    The images of a batch have one size and arrive normalised, so torchvision's resizing
    transform is not used; matching, anchors, box coding and the head's layers are torchvision's.

    Args:
        config: The detector's description.
        losses: The head's losses; None for a detector that will not be trained.
    """

    proposal_matcher: Matcher

    def __init__(self, config: DetectorConfig, losses: HeadLosses | None = None) -> None:
        backbone, strides = build_backbone(config)
        sizes = tuple(
            tuple(config.anchor_scale * s * octave for octave in OCTAVES) for s in strides
        )
        anchor_generator = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))
        head = HarmonizedRetinaNetHead(
            int(backbone.out_channels),  # type: ignore[arg-type]
            anchor_generator.num_anchors_per_location()[0],
            config.num_classes,
            losses=losses,
            convs=config.head_convs,
            soft=config.assigner == "cleanliness",
        )
        RetinaNet.__init__(
            self, backbone, config.num_classes, anchor_generator=anchor_generator, head=head
        )
        self.config = config
        head.set_prior(config.prior)
        anchors = make_anchors(anchor_generator, config.image_size, strides)
        self.register_buffer("anchors", anchors, persistent=False)

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[B, A, C]` and box deltas `[B, A, 4]` of the `A` anchors."""
        outputs = self.outputs(images)
        return outputs["cls_logits"], outputs["bbox_regression"]

    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every anchor; an anchor's box is the same for all classes."""
        logits, deltas = (output.float() for output in self.raw(images))
        boxes = decode_boxes(deltas, self.anchors, self.config.image_size)
        return Predictions(boxes.unsqueeze(2), torch.sigmoid(logits), logits)

    def match(self, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Index of each anchor's ground truth, int64 `[A]`: -1 for background, -2 for neither.

        By IoU (0.5 / 0.4), or the best anchors of each ground truth, as `config.assigner` names.
        """
        boxes = target["boxes"]
        if not len(boxes):
            return torch.full_like(anchors[:, 0], Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        if self.config.assigner == "cleanliness":
            return without_ignored(assign_top_anchors(boxes, anchors), target)
        return without_ignored(self.proposal_matcher(box_iou(boxes, anchors)), target)
