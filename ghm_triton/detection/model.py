"""The detector: torchvision's RetinaNet, with losses that see the whole batch at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from ghm_triton.detection.backbones import build_backbone
from ghm_triton.detection.config import DetectorConfig
from ghm_triton.detection.heads import HarmonizedRetinaNetHead, HeadLosses

ASPECT_RATIOS = (0.5, 1.0, 2.0)
OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class Detector(RetinaNet):  # type: ignore[misc]
    """`torchvision.models.detection.RetinaNet` on images of one fixed, letterboxed size.

    The images of a batch have one size and arrive normalised, so torchvision's resizing
    transform is not used; matching, anchors, box coding and the head's layers are torchvision's.

    Args:
        config: What to build.
        losses: The head's losses; None for a detector that will not be trained.
    """

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
        )
        super().__init__(backbone, config.num_classes, anchor_generator=anchor_generator, head=head)
        self.config = config
        head.set_prior(config.prior)
        self.register_buffer("anchors", self._make_anchors(strides), persistent=False)

    def _make_anchors(self, strides: tuple[int, ...]) -> Tensor:
        height, width = self.config.image_size
        levels = [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
        images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
        anchors: Tensor = self.anchor_generator(images, levels)[0]
        return anchors

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run backbone and head.

        Args:
            images: Normalised, letterboxed images, float `[B, 3, H, W]` with `(H, W)` the
                configuration's `image_size`.

        Returns:
            Class logits `[B, A, C]` and box deltas `[B, A, 4]` for the `A` anchors.

        Raises:
            ValueError: The images have another size.
        """
        if tuple(images.shape[-2:]) != tuple(self.config.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} pixels,"
                f" the detector takes {self.config.image_size}"
            )
        output = self.head(list(self.backbone(images).values()))
        return output["cls_logits"], output["bbox_regression"]

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The training losses of one batch.

        Args:
            images: As `raw` takes them.
            targets: One dict an image: `boxes` `[N, 4]` in input pixels, `labels` int64 `[N]`, and
                optionally `ignore` bool `[N]`: boxes whose anchors take no part in training.

        Returns:
            `classification` and `bbox_regression`, scalars. In evaluation use
            `ghm_triton.detection.postprocess.DeployedDetector` instead.
        """
        logits, deltas = self.raw(images)
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        anchors: Tensor = self.anchors
        losses: dict[str, Tensor] = self.compute_loss(targets, outputs, [anchors] * len(targets))
        return losses

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
    ) -> dict[str, Tensor]:
        """Match anchors to ground truth by IoU (0.5 / 0.4), then ask the head for its losses."""
        matches = [self.match(a, t) for a, t in zip(anchors, targets, strict=True)]
        losses: dict[str, Tensor] = self.head.compute_loss(targets, head_outputs, anchors, matches)
        return losses

    def labels(self, targets: list[dict[str, Tensor]]) -> Tensor:
        """Class of every anchor for these targets, int64 `[B, A]`; see the head's `labels`."""
        labels: Tensor = self.head.labels(targets, [self.match(self.anchors, t) for t in targets])
        return labels

    def match(self, anchors: Tensor, target: dict[str, Tensor]) -> Tensor:
        """Index of each anchor's ground truth, -1 for background, -2 for neither. `[A]`."""
        matcher = self.proposal_matcher
        matches = anchors.new_full((len(anchors),), matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        if len(target["boxes"]):
            matches = matcher(box_iou(target["boxes"], anchors))
            if "ignore" in target:
                hidden = (matches >= 0) & target["ignore"][matches.clamp(min=0)]
                matches = matches.masked_fill(hidden, matcher.BETWEEN_THRESHOLDS)
        return matches


def build_detector(config: DetectorConfig, losses: HeadLosses | None = None) -> Detector:
    """Build a detector from its description, with random weights drawn from torch's generator."""
    return Detector(config, losses)


def channels_last(module: nn.Module) -> nn.Module:
    """Put convolution weights in the memory order that is fastest on CPUs and tensor cores."""
    kwargs: dict[str, Any] = {"memory_format": torch.channels_last}
    return module.to(**kwargs)
