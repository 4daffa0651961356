"""Evaluation of a detector on held-out images."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_iou

from ghm_triton.detection.data import DetectionDataset, Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.evidence import SCORE_FLOOR, ClassStatistics
from ghm_triton.tables import table

MATCH_IOU = 0.5


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image.

    Attributes:
        boxes: float32 `[D, 4]`, x1 y1 x2 y2 in the image's own pixels, clipped to it.
        scores: float32 `[D]`, descending.
        labels: int64 `[D]`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


Predict = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def in_image_pixels(boxes: Tensor, scales: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Map boxes from input pixels back to an image of `(width, height)`."""
    width, height = size
    boxes = boxes / torch.tensor([*scales, *scales])
    return boxes.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=boxes.dtype))


def detect(
    predict: Predict, config: DetectorConfig, dataset: DetectionDataset, batch_size: int = 16
) -> Iterator[tuple[Sample, Detections]]:
    """Run a detector on a data set.

    Args:
        predict: Takes normalised images `[B, 3, H, W]` and returns padded boxes, scores, labels
            and counts, as a `DeployedDetector` with its thresholds does.
        config: The detector's configuration.
        dataset: The images.
        batch_size: Images per call.

    Yields:
        Every sample with its detections in image pixels, in order.
    """
    letterbox = Letterbox(config)
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        inputs = [letterbox(sample.image) for sample in samples]
        boxes, scores, labels, counts = predict(torch.stack([image for image, _ in inputs]))
        for i, sample in enumerate(samples):
            number = int(counts[i])
            mapped = in_image_pixels(boxes[i, :number].cpu(), inputs[i][1], sample.image.size)
            yield sample, Detections(mapped, scores[i, :number].cpu(), labels[i, :number].cpu())


def torch_predictor(
    deployed: DeployedDetector, thresholds: Tensor | None = None, iou_threshold: float | None = None
) -> Predict:
    """A `predict` for `detect` from a detector of torch.

    Args:
        deployed: The detector.
        thresholds: float32 `[C]`; None for `SCORE_FLOOR` everywhere.
        iou_threshold: IoU threshold of NMS; None for the configuration's.
    """
    config = deployed.config
    device = next(deployed.parameters()).device
    floor = torch.full((config.num_classes,), SCORE_FLOOR) if thresholds is None else thresholds
    iou = torch.tensor([config.iou_threshold if iou_threshold is None else iou_threshold])

    @torch.inference_mode()
    def predict(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = deployed(
            images.to(device), floor.to(device), iou
        )
        return result

    return predict


def match(detections: Detections, boxes: Tensor, labels: Tensor) -> Tensor:
    """Which detections match a ground truth of their class, bool `[D]`.

    Greedy, best score first, each ground truth once, IoU at least 0.5.
    """
    matched = torch.zeros(len(detections.scores), dtype=torch.bool)
    free = torch.ones(len(boxes), dtype=torch.bool)
    overlap = box_iou(detections.boxes, boxes) if len(boxes) else torch.zeros(len(matched), 0)
    for i in detections.scores.argsort(descending=True, stable=True).tolist():
        candidates = torch.where(free & (labels == detections.labels[i]), overlap[i], 0.0)
        if len(candidates) and float(candidates.max()) >= MATCH_IOU:
            free[int(candidates.argmax())] = False
            matched[i] = True
    return matched


def observe(
    statistics: ClassStatistics, results: list[tuple[Sample, Detections]]
) -> ClassStatistics:
    """Fill the held-out part of `statistics` from detections on held-out images."""
    statistics.forget_held_out()
    for sample, detections in results:
        boxes, labels = sample.boxes[~sample.ignore], sample.labels[~sample.ignore]
        matched = match(detections, boxes, labels)
        hidden = ~matched & _on_ignored(detections, sample)
        keep = ~hidden
        statistics.observe_detections(
            detections.scores[keep], detections.labels[keep], matched[keep], labels
        )
    return statistics


def _on_ignored(detections: Detections, sample: Sample) -> Tensor:
    """Detections on an ignored object of their class, which do not count."""
    if not bool(sample.ignore.any()):
        return torch.zeros(len(detections.scores), dtype=torch.bool)
    same = detections.labels[:, None] == sample.labels[sample.ignore][None]
    overlap = box_iou(detections.boxes, sample.boxes[sample.ignore])
    covered: Tensor = ((overlap >= MATCH_IOU) & same).any(dim=1)
    return covered


@dataclass(frozen=True)
class MeanAveragePrecision:
    """COCO's average precision, each in [0, 1]; NaN for a class without ground truth.

    Attributes:
        ap: Mean over classes and IoU 0.50:0.95.
        ap50: At IoU 0.5.
        ap75: At IoU 0.75.
        per_class: Class name to `(ap, ap50)`.
        images: Images evaluated.
    """

    ap: float
    ap50: float
    ap75: float
    per_class: dict[str, tuple[float, float]]
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with None for NaN."""
        return {
            "ap": _number(self.ap),
            "ap50": _number(self.ap50),
            "ap75": _number(self.ap75),
            "per_class": {
                name: (_number(ap), _number(ap50)) for name, (ap, ap50) in self.per_class.items()
            },
            "images": self.images,
        }

    def table(self) -> str:
        """AP and AP50 per class, then their mean, for a terminal."""
        scores = [(name, f"{ap:.3f}", f"{ap50:.3f}") for name, (ap, ap50) in self.rows()]
        return table(("class", "AP", "AP50"), scores)

    def rows(self) -> list[tuple[str, tuple[float, float]]]:
        """`(name, (ap, ap50))` of the classes, then of their mean as `all`."""
        return [*self.per_class.items(), ("all", (self.ap, self.ap50))]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def mean_average_precision(
    class_names: tuple[str, ...], results: list[tuple[Sample, Detections]]
) -> MeanAveragePrecision:
    """COCO mAP of detections, computed by faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    truth, detected = _coco_format(class_names, results)
    with contextlib.redirect_stdout(io.StringIO()):  # progress
        reference = COCO(truth)
        evaluation = COCOeval_faster(reference, reference.loadRes(detected), iouType="bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.where(evaluation.eval["precision"] < 0, np.nan, evaluation.eval["precision"])
    table = precision[:, :, :, 0, -1]  # IoU, recall, class; all areas, most detections

    def mean(part: NDArray[np.float64]) -> float:
        return float(np.nanmean(part)) if np.isfinite(part).any() else float("nan")

    per_class = {
        name: (mean(table[:, :, j]), mean(table[0, :, j])) for j, name in enumerate(class_names)
    }
    return MeanAveragePrecision(
        mean(table), mean(table[0]), mean(table[5]), per_class, len(results)
    )


def _coco_format(
    class_names: tuple[str, ...], results: list[tuple[Sample, Detections]]
) -> tuple[dict[str, object], list[dict[str, object]]]:
    truth: list[dict[str, object]] = []
    detected: list[dict[str, object]] = []
    images = []
    for number, (sample, detections) in enumerate(results, start=1):
        images.append({"id": number, "width": sample.image.width, "height": sample.image.height})
        objects = zip(
            sample.boxes.tolist(), sample.labels.tolist(), sample.ignore.tolist(), strict=True
        )
        for box, label, ignored in objects:
            annotation = _annotation(number, box, label)
            truth.append({**annotation, "id": len(truth) + 1, "iscrowd": int(ignored)})
        for box, label, score in zip(
            detections.boxes.tolist(),
            detections.labels.tolist(),
            detections.scores.tolist(),
            strict=True,
        ):
            detected.append({**_annotation(number, box, label), "score": score})
    categories = [{"id": j + 1, "name": name} for j, name in enumerate(class_names)]
    return {"images": images, "annotations": truth, "categories": categories, "info": {}}, detected


def _annotation(image: int, box: list[float], label: int) -> dict[str, object]:
    x1, y1, x2, y2 = box
    area = (x2 - x1) * (y2 - y1)
    return {
        "image_id": image,
        "category_id": label + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": area,
    }
