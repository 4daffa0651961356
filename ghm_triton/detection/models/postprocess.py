"""Post-processing from predictions to detections, shared by evaluation and export."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.ops import nms

from ghm_triton.detection.models.detector import Detector, Predictions

# torchvision's BoxCoder clips the log scale here, so that exp() stays finite.
MAX_LOG_GROWTH = math.log(1000.0 / 16)
# The rank of an excluded entry; far below any logit, and finite, as ONNX requires.
OUT = -1e30

Padded = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("ghm::nms", mutates_args=())
def class_nms(boxes: Tensor, ranks: Tensor, iou_threshold: Tensor, most: int) -> Tensor:
    """Non-maximum suppression per class and image, as ONNX's `NonMaxSuppression` defines it.

    Args:
        boxes: float32 `[B, K, 4]`, x1 y1 x2 y2.
        ranks: float32 `[B, C, K]`, the higher the better; entries at `OUT` are excluded.
        iou_threshold: float32 `[1]`; a box that overlaps a better one by more is dropped.
        most: Largest number of survivors per class and image, the best ones.

    Returns:
        int64 `[S, 3]`: (image, class, box) of every survivor.
    """
    iou = float(iou_threshold)
    kept = [torch.zeros(0, 3, dtype=torch.int64, device=boxes.device)]
    for image in range(ranks.shape[0]):
        for label in torch.nonzero((ranks[image] > OUT).any(dim=1)).flatten().tolist():
            entries = torch.nonzero(ranks[image, label] > OUT).flatten()
            best_first = nms(boxes[image, entries], ranks[image, label, entries], iou)
            survivors = entries[best_first[:most]]
            owner = torch.tensor([image, label], device=boxes.device).expand(len(survivors), 2)
            kept.append(torch.cat([owner, survivors[:, None]], dim=1))
    return torch.cat(kept)


@class_nms.register_fake
def _(boxes: Tensor, ranks: Tensor, iou_threshold: Tensor, most: int) -> Tensor:
    del ranks, iou_threshold, most
    survivors = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((survivors, 3), dtype=torch.int64)


def clip_boxes(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Boxes `[..., 4]`, x1 y1 x2 y2, cut off at the borders of an image of `(height, width)`."""
    height, width = image_size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    # Expanded, as runtimes are slow to broadcast over so few numbers.
    return torch.minimum(boxes.clamp(min=0.0), limit.expand(boxes.shape))


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
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_size + (anchors[..., :2] + 0.5 * anchor_size)
    half = 0.5 * torch.exp(deltas[..., 2:].clamp(max=MAX_LOG_GROWTH)) * anchor_size
    return clip_boxes(torch.cat([centre - half, centre + half], dim=-1), image_size)


def suppress(
    boxes: Tensor, scores: Tensor, ranks: Tensor, iou_threshold: Tensor, most: int
) -> Padded:
    """NMS per class, then the best of all classes, padded; no loop over the batch.

    Args:
        boxes: `[B, G, K, 4]`: `G` is 1, or `C` where each class has its own boxes.
        scores: `[B, C, K]`.
        ranks: `[B, C, K]`; entries at `OUT` are excluded.
        iou_threshold: `[1]`.
        most: Largest number of detections per image.

    Returns:
        `boxes` `[B, M, 4]`, `scores` `[B, M]`, `labels` int64 `[B, M]` and their number, int64
        `[B]`; best rank first, padded with 0, 0 and -1.
    """
    groups, count = boxes.shape[1:3]
    # NMS treats each group of classes that share boxes as an image.
    grouped = ranks.reshape(-1, ranks.shape[1] // groups, count)
    kept = class_nms(boxes.flatten(0, 1), grouped, iou_threshold, most)
    where = (kept[:, 0], kept[:, 1], kept[:, 2])
    survivors = torch.full_like(grouped, OUT).index_put(where, grouped[where])
    survivors = survivors.reshape(ranks.shape).flatten(1)
    top, position = survivors.topk(min(most, survivors.shape[1]), dim=1)
    stands = top > OUT
    image = torch.arange(position.shape[0], device=position.device).unsqueeze(1)
    labels = torch.where(stands, position // count, -1)
    kept_boxes = boxes.flatten(1, 2)[image, position % (groups * count)]
    return (
        torch.where(stands.unsqueeze(2), kept_boxes, 0.0),
        torch.where(stands, scores.flatten(1)[image, position], 0.0),
        labels,
        stands.sum(1),
    )


class DeployedDetector(nn.Module):
    """A detector with its thresholds and NMS: images in, detections out, no loop over the batch.

    Args:
        detector: The trained detector; put into evaluation mode.

    A detection is reported iff `score >= class_thresholds[label]`. One place may be reported for
    several classes, as in torchvision.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.config = detector.config

    def forward(self, images: Tensor, class_thresholds: Tensor, iou_threshold: Tensor) -> Padded:
        """Detect.

        Args:
            images: Normalised, letterboxed, float32 `[B, 3, H, W]`.
            class_thresholds: float32 `[C]`, in [0, 1].
            iou_threshold: float32 `[1]`, in [0, 1].

        Returns:
            `boxes` `[B, M, 4]` in input pixels, `scores` `[B, M]`, `labels` int64 `[B, M]` and
            `num_detections` int64 `[B]`; sorted by score, padded with 0, 0 and -1.
        """
        return self.select(self.detector.predict(images), class_thresholds, iou_threshold)

    def select(
        self, predictions: Predictions, class_thresholds: Tensor, iou_threshold: Tensor
    ) -> Padded:
        """Threshold, suppress and sort: predictions to padded detections, as `forward` returns.

        Scores are compared with thresholds, ranks with one another.
        """
        boxes, scores, ranks = predictions
        # Expanded, as runtimes are slow to broadcast over so few numbers.
        ranks = torch.where(scores >= class_thresholds.expand(scores.shape[1:]), ranks, OUT)
        # The best places by any class are kept; by indexing, because gather exports badly.
        count = min(self.config.candidates, ranks.shape[1])
        _, best = ranks.amax(dim=2).topk(count, dim=1)
        image = torch.arange(best.shape[0], device=best.device).unsqueeze(1)
        boxes, scores, ranks = (
            x[image, best].transpose(1, 2).contiguous() for x in (boxes, scores, ranks)
        )
        return suppress(boxes, scores, ranks, iou_threshold, self.config.max_detections)
