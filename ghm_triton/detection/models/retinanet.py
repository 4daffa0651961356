"""RetinaNet: torchvision's, with losses that see the whole batch at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from ghm_triton.detection.models.anchors import ASPECT_RATIOS, make_anchors
from ghm_triton.detection.models.backbones import build_backbone
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Detector, Predictions
from ghm_triton.detection.models.heads import HarmonizedRetinaNetHead, HeadLosses
from ghm_triton.detection.models.postprocess import decode_boxes
from ghm_triton.imbalance.cleanliness import assign_top_anchors

OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class RetinaNetDetector(Detector, RetinaNet):  # type: ignore[misc]
    """`torchvision.models.detection.RetinaNet` on images of one fixed, letterboxed size.

    The images of a batch have one size and arrive normalised, so torchvision's resizing
    transform is not used; matching, anchors, box coding and the head's layers are torchvision's.

    Args:
        config: What to build.
        losses: The head's losses; None for a detector that will not be trained.
    """

    anchors: Tensor
    backbone: nn.Module
    proposal_matcher: Matcher
    head: HarmonizedRetinaNetHead

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
        super().__init__(backbone, config.num_classes, anchor_generator=anchor_generator, head=head)
        self.config = config
        head.set_prior(config.prior)
        anchors = make_anchors(anchor_generator, config.image_size, strides)
        self.register_buffer("anchors", anchors, persistent=False)

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits `[B, A, C]` and box deltas `[B, A, 4]` of the `A` anchors."""
        self.require_size(images)
        output = self.head(list(self.backbone(images).values()))
        return output["cls_logits"], output["bbox_regression"]

    def predict(self, images: Tensor) -> Predictions:
        """Boxes and scores of every anchor; an anchor's box is the same for all classes."""
        logits, deltas = (output.float() for output in self.raw(images))
        boxes = decode_boxes(deltas, self.anchors, self.config.image_size)
        return Predictions(boxes.unsqueeze(2), torch.sigmoid(logits), logits)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses of one batch: `classification` and `bbox_regression`."""
        logits, deltas = self.raw(images)
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        return self.compute_loss(targets, outputs, [self.anchors] * len(targets))

    def observe_labels(self, observer: Callable[[Tensor], None]) -> None:
        """Have `observer` called with the label of every anchor, `[B, A]`."""
        self.head.observer = observer

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
    ) -> dict[str, Tensor]:
        """Match anchors to ground truth, then ask the head for its losses."""
        matches = [self.match(a, t) for a, t in zip(anchors, targets, strict=True)]
        return self.head.compute_loss(targets, head_outputs, anchors, matches)

    def labels(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Class of every anchor for these targets, int64 `[B, A]`; see the head's `labels`."""
        return self.head.labels(targets, [self.match(self.anchors, t) for t in targets])

    def match(self, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Index of each anchor's ground truth, -1 for background, -2 for neither. `[A]`.

        By IoU (0.5 / 0.4), or of each ground truth its best anchors, as the configuration says.
        """
        matcher = self.proposal_matcher
        matches = anchors.new_full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        if len(target["boxes"]):
            if self.config.assigner == "cleanliness":
                matches = assign_top_anchors(target["boxes"], anchors)
            else:
                matches = matcher(box_iou(target["boxes"], anchors))
            if "ignore" in target:
                hidden = (matches >= 0) & target["ignore"][matches.clamp(min=0)]
                matches = matches.masked_fill(hidden, matcher.BETWEEN_THRESHOLDS)
        return matches
