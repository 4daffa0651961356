"""From head outputs to detections: the one definition that evaluation and export share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from ghm_triton.detection.model import Detector

# torchvision's BoxCoder clips the log of a box's growth here, so that exp() stays finite.
MAX_LOG_GROWTH = math.log(1000.0 / 16)
# The rank of an entry that takes no part; far below any logit, and finite, as ONNX wants it.
OUT = -1e30


@torch.library.custom_op("ghm::nms", mutates_args=())
def class_nms(boxes: Tensor, ranks: Tensor, iou_threshold: Tensor) -> Tensor:
    """Non-maximum suppression a class and image, as ONNX's `NonMaxSuppression` defines it.

    Args:
        boxes: float32 `[B, K, 4]`, x1 y1 x2 y2.
        ranks: float32 `[B, C, K]`, the higher the better; entries at `OUT` take no part.
        iou_threshold: float32 `[1]`; a box that overlaps a better one by more is dropped.

    Returns:
        int64 `[S, 3]`: (image, class, box) of every survivor.
    """
    iou = float(iou_threshold)
    kept = [torch.zeros(0, 3, dtype=torch.int64, device=boxes.device)]
    for image in range(ranks.shape[0]):
        for label in torch.nonzero((ranks[image] > OUT).any(dim=1)).flatten().tolist():
            entries = torch.nonzero(ranks[image, label] > OUT).flatten()
            survivors = entries[nms(boxes[image, entries], ranks[image, label, entries], iou)]
            owner = torch.tensor([image, label], device=boxes.device).expand(len(survivors), 2)
            kept.append(torch.cat([owner, survivors[:, None]], dim=1))
    return torch.cat(kept)


@class_nms.register_fake
def _(boxes: Tensor, ranks: Tensor, iou_threshold: Tensor) -> Tensor:
    del ranks, iou_threshold
    survivors = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((survivors, 3), dtype=torch.int64)


def decode_boxes(deltas: Tensor, anchors: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Apply box deltas to anchors and clip to the image.

    Args:
        deltas: `[..., 4]`: dx, dy in anchor sizes, log growth of width and height.
        anchors: `[..., 4]`, x1 y1 x2 y2 in pixels; broadcasts against `deltas`.
        image_size: `(height, width)`.

    Returns:
        Boxes `[..., 4]`, x1 y1 x2 y2 in pixels. Equal to torchvision's `BoxCoder` with unit
        weights followed by `clip_boxes_to_image`, in operations that export with a dynamic batch.
    """
    height, width = image_size
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_size + (anchors[..., :2] + 0.5 * anchor_size)
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_GROWTH)) * anchor_size
    corners = torch.cat([centre - half, centre + half], dim=-1)
    limit = torch.tensor([width, height, width, height], dtype=corners.dtype, device=corners.device)
    return torch.minimum(corners.clamp(min=0.0), limit)


class DeployedDetector(nn.Module):
    """A detector with its thresholds and NMS: images in, detections out, no loop over the batch.

    Args:
        detector: The trained detector; put into evaluation mode.

    A detection stands iff `score >= class_thresholds[label]`. One anchor may be shown for several
    classes, as in torchvision.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.config = detector.config

    def forward(
        self, images: Tensor, class_thresholds: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: Normalised, letterboxed, float32 `[B, 3, H, W]`.
            class_thresholds: float32 `[C]`, in [0, 1].
            iou_threshold: float32 `[1]`, in [0, 1].

        Returns:
            `boxes` `[B, M, 4]` in input pixels, `scores` `[B, M]`, `labels` int64 `[B, M]` and
            `num_detections` int64 `[B]`; sorted by score, padded with 0, 0 and -1.
        """
        logits, deltas = self.detector.raw(images)
        return self.select(logits.float(), deltas.float(), class_thresholds, iou_threshold)

    def select(
        self, logits: Tensor, deltas: Tensor, class_thresholds: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Threshold, suppress and sort: `[B, A, C]` and `[B, A, 4]` to padded detections.

        Scores decide what stands, logits decide what is better: near 1 the probabilities of a
        confident detector are equal in float32, and each runtime would break the ties its own way.
        """
        anchors: Tensor = self.detector.anchors
        scores = torch.sigmoid(logits)
        ranks = torch.where(scores >= class_thresholds, logits, torch.full_like(logits, OUT))
        # The best anchors of any class stay; indexing, because gather exports badly.
        count = min(self.config.candidates, anchors.shape[0])
        _, best = ranks.amax(dim=2).topk(count, dim=1)
        image = torch.arange(best.shape[0], device=best.device).unsqueeze(1)
        boxes = decode_boxes(deltas[image, best], anchors[best], self.config.image_size)
        scores, ranks = (x[image, best].transpose(1, 2).contiguous() for x in (scores, ranks))
        return self._suppress(boxes, scores, ranks, iou_threshold)

    def _suppress(
        self, boxes: Tensor, scores: Tensor, ranks: Tensor, iou_threshold: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """NMS, then the best of all classes; `[B, K, 4]` and twice `[B, C, K]`."""
        kept = class_nms(boxes, ranks, iou_threshold)
        where = (kept[:, 0], kept[:, 1], kept[:, 2])
        survivors = torch.full_like(ranks, OUT).index_put(where, ranks[where]).flatten(1)
        most = min(self.config.max_detections, survivors.shape[1])
        top, position = survivors.topk(most, dim=1)
        stands = top > OUT
        anchors = ranks.shape[2]
        image = torch.arange(position.shape[0], device=position.device).unsqueeze(1)
        labels = torch.where(stands, position // anchors, -1)
        found = torch.where(stands.unsqueeze(2), boxes[image, position % anchors], 0.0)
        own = torch.where(stands, scores.flatten(1)[image, position], 0.0)
        return found, own, labels, stands.sum(dim=1)
