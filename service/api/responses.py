"""What was found, as the answer says it: in the image's own pixels, each with its threshold."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from export.card import DetectorCard
from service.core.detections import DetectionParams, Detections
from service.core.errors import ProblemError
from service.images.decode import Geometry


def image_answer(
    geometry: Geometry, found: Detections, wanted: DetectionParams, card: DetectorCard
) -> dict[str, Any]:
    """One image's part of an answer.

    Args:
        geometry: How the image became the model's input.
        found: What the model found, in input pixels.
        wanted: The values in force for this request.
        card: The model's.

    Returns:
        `image` and `detections` as `service.core.schema` describes them.
    """
    number = wanted.max_detections
    boxes = geometry.to_image(found.boxes[:number]).round(3).tolist()
    thresholds = wanted.class_thresholds.tolist()
    rows = zip(boxes, found.scores[:number].tolist(), found.labels[:number].tolist(), strict=True)
    return {
        "image": {"width": geometry.width, "height": geometry.height},
        "detections": [
            {
                "box": box,
                "score": score,
                "label": label,
                "class": card.class_names[label],
                "threshold": thresholds[label],
            }
            for box, score, label in rows
        ],
    }


def failed_answer(problem: ProblemError) -> dict[str, Any]:
    """The part of an answer for an image that could not be read.

    Args:
        problem: Why.

    Returns:
        `error` as `service.core.schema` describes it.
    """
    title = HTTPStatus(problem.status).phrase
    return {"error": {"status": problem.status, "title": title, "detail": problem.detail}}
