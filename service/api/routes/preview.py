"""`POST /v1/thresholds/preview`: what every threshold would do to an image, from one inference."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from export.card import DetectorCard
from service.api.pipeline import Prepared, batch_of, counted, opened, read_request
from service.api.request_body import query_parameters, request_body
from service.api.responses import image_answer
from service.api.state import ServiceState, service_state
from service.api.timer import Timer
from service.core.detections import OFF, DetectionParams, Detections
from service.core.errors import ProblemError, documented
from service.core.params import PreviewOptions, resolve_preview
from service.core.schema import PreviewResponse
from service.engine.deadline import while_wanted
from service.engine.session import ServedModel

router = APIRouter(prefix="/v1/thresholds", tags=["detection"])


@router.post(
    "/preview",
    summary="Show what thresholds would do",
    response_model=PreviewResponse,
    responses=documented(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": request_body("/v1/thresholds/preview", PreviewOptions, many=False),
        "parameters": query_parameters(PreviewOptions),
    },
)
async def preview(request: Request) -> Response:
    """Count, for one image, how many objects of each class would be found at each threshold.

    The model runs once, with the floor as the threshold of every class. Suppression goes from the
    best box down and is a matter of each class alone, so what passes a higher threshold is what
    would be found at it; only the limit on the number of objects can cut some off, and then
    `truncated` is true. The objects come along with their scores: move a slider and filter them,
    without asking again.
    """
    service = service_state(request)
    with counted(service.metrics):
        service.scheduler.check_room()
        timer = Timer()
        upload, options = await read_request(request, service, PreviewOptions)
        if upload.many:
            raise ProblemError(400, "a preview is of one image: send `file` or `image`")
        model = service.registry.get(options.model, options.version)
        wanted, steps = resolve_preview(options, model.card)
        timer.lap("read_ms")
        with service.scheduler.admit(1):
            work = _answer(service, model, upload.images[0], wanted, steps, timer)
            body = await while_wanted(request, work, service.settings.deadline_ms)
    return Response(orjson.dumps(body), media_type="application/json")


async def _answer(
    service: ServiceState,
    model: ServedModel,
    image: tuple[str, bytes],
    wanted: DetectionParams,
    steps: list[float],
    timer: Timer,
) -> dict[str, Any]:
    async with opened(service, model.card, *image) as opening:
        prepared: Prepared = opening
    timer.add("decode_ms", prepared.seconds)
    started = perf_counter()
    outputs = await service.scheduler.run(model, batch_of([prepared]), wanted)
    timer.add("inference_ms", perf_counter() - started)
    found = outputs.image(0)
    answer = image_answer(prepared.geometry, found, wanted, model.card)
    for one in answer["detections"]:
        del one["threshold"]  # the floor, which is nobody's threshold
    truncated = len(found.scores) >= model.card.max_detections
    floor = min(threshold for threshold in wanted.class_thresholds.tolist() if threshold != OFF)
    return {
        "model": model.name,
        "version": model.version,
        "image": answer["image"],
        "floor": floor,
        "truncated": truncated,
        "exact_above": float(found.scores[-1]) if truncated else None,
        "steps": steps,
        "classes": class_counts(found, steps, model.card),
        "detections": answer["detections"],
        "timings": timer.done(),
    }


def class_counts(
    found: Detections, steps: Sequence[float], card: DetectorCard
) -> list[dict[str, Any]]:
    """For each class, how many detections reach each step.

    Args:
        found: What was found at a floor no higher than any step.
        steps: Rising; compared as the float32 that the graph would compare with.
        card: The model's.
    """
    bars = np.array(steps, dtype=np.float32)
    return [
        {
            "class": name,
            "label": label,
            "threshold": card.class_thresholds[label],
            "counts": [int((scores >= bar).sum()) for bar in bars]
            if (scores := found.scores[found.labels == label]).size
            else [0] * len(bars),
        }
        for label, name in enumerate(card.class_names)
    ]
