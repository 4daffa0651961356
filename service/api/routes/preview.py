"""`POST /v1/thresholds/preview`: the effect of every threshold on an image, from one inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from export.card import DetectorCard
from service.api import pipeline
from service.api.openapi import options_extra, problems
from service.api.pipeline import Job, Prepared, image_answer
from service.core.detections import Detections
from service.core.errors import ProblemError
from service.core.params import PreviewOptions, resolve_preview
from service.core.schema import PreviewResponse

router = APIRouter(prefix="/v1/thresholds", tags=["detection"])


@router.post(
    "/preview",
    summary="Show what thresholds would do",
    response_model=PreviewResponse,
    responses=problems(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra=options_extra("/v1/thresholds/preview", PreviewOptions, many=False),
)
async def preview(request: Request) -> Response:
    """Count, for one image, how many objects of each class would be found at each threshold.

    The model runs once, with the floor as the threshold of every class. Suppression goes down from
    the best box, per class, so the boxes above a higher threshold are those that would be found at
    it. Only the limit on the number of objects can cut some off; then `truncated` is true. The
    objects are returned with their scores, so that clients can filter them without another request.
    """
    return await pipeline.run(request, PreviewOptions, _answer)


async def _answer(job: Job[PreviewOptions]) -> Response:
    if job.upload.many:
        raise ProblemError(400, "a preview is of one image: send `file` or `image`")
    card = job.model.card
    params, floor, steps = resolve_preview(job.options, card)
    prepared = [one for one in await pipeline.decode(job) if isinstance(one, Prepared)]
    [detections] = await pipeline.predict(job, prepared, params)
    answer = image_answer(prepared[0].geometry, detections, params, card)
    for one in answer["detections"]:
        del one["threshold"]  # the floor, which is no class's threshold
    truncated = len(detections.scores) >= card.max_detections
    body = {
        "model": job.model.name,
        "version": job.model.version,
        "image": answer["image"],
        "floor": floor,
        "truncated": truncated,
        "exact_above": float(detections.scores[-1]) if truncated else None,
        "steps": steps,
        "classes": class_counts(detections, steps, card),
        "detections": answer["detections"],
        "timings": job.done(),
    }
    return pipeline.encode(job, body)


def class_counts(
    detections: Detections, steps: Sequence[float], card: DetectorCard
) -> list[dict[str, Any]]:
    """Count, per class, the detections that reach each step.

    Args:
        detections: Detections at a floor no higher than any step.
        steps: In ascending order; compared as float32, as the graph does.
        card: The model's card.
    """
    bars = np.array(steps, dtype=np.float32)[:, None]
    return [
        {
            "class": name,
            "label": label,
            "threshold": card.class_thresholds[label],
            "counts": (detections.scores[detections.labels == label] >= bars).sum(1).tolist(),
        }
        for label, name in enumerate(card.class_names)
    ]
