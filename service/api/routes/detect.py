"""The detection routes: `POST /v1/detect`, and `POST /v1/thresholds/preview`.

A preview counts what every threshold would find in an image, from one inference.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from PIL import Image
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from export.card import DetectorCard
from ghm_triton.drawing import draw_detections
from service.api import pipeline
from service.api.openapi import options_extra, problems
from service.api.pipeline import Job, Prepared, failed_answer, image_answer
from service.core.detections import (
    DetectionParams,
    Detections,
    DetectOptions,
    PreviewOptions,
    resolve,
    resolve_preview,
)
from service.core.errors import ProblemError
from service.core.schema import CocoResult, DetectManyResponse, DetectResponse, PreviewResponse
from service.http.encodings import parse_weights

router = APIRouter(prefix="/v1", tags=["detection"])

PNG, JPEG = "image/png", "image/jpeg"

_FILE = {"schema": {"type": "string", "format": "binary"}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The detections: as JSON, as COCO results, or drawn into the image",
        "content": {PNG: _FILE, JPEG: _FILE},
        "headers": {
            "X-Detections": {
                "description": "With `format=image`, the number of objects drawn",
                "schema": {"type": "integer", "minimum": 0},
            }
        },
    },
    **problems(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}


@router.post(
    "/detect",
    summary="Find objects in images",
    response_model=DetectResponse | DetectManyResponse | list[CocoResult],
    responses=_ANSWERS,
    openapi_extra=options_extra("/v1/detect", DetectOptions, many=True),
)
async def detect(request: Request) -> Response:
    """Find objects in one image or several.

    Send an image as the body, or one `file` of a form, or base64 as `image` of a JSON object, and
    get one object. Send `files` or `images` and get a list `results`, where an image that cannot
    be read has an `error` in its place; where none can, the request fails with the status of the
    first, as it does with `format=coco` as soon as one cannot. Bodies may be compressed
    (`Content-Encoding: gzip` or `deflate`). Options are query parameters, form fields, or members
    of the JSON object.

    A detection is returned if its score reaches the threshold of its class: the file's own, or
    the one that this request sets. Each detection has the threshold that it passed.
    """
    return await pipeline.run(request, DetectOptions, _answer)


async def _answer(job: Job[DetectOptions]) -> Response:
    params = resolve(job.options, job.model.card)
    _check_format(job)
    if job.options.format == "image":
        return await _drawn_image(job, params)
    results = await pipeline.decode(job)
    prepared = [result for result in results if isinstance(result, Prepared)]
    if job.options.format == "coco":
        for result in results:
            if isinstance(result, ProblemError):
                raise result
        ids = range(len(results)) if job.options.image_ids is None else job.options.image_ids
        return pipeline.encode(job, coco_results(await _detections(job, prepared, params), ids))
    answers = iter(await _detections(job, prepared, params))
    images = [failed_answer(r) if isinstance(r, ProblemError) else next(answers) for r in results]
    body: dict[str, Any] = {"model": job.model.name, "version": job.model.version}
    body |= {"results": images} if job.upload.many else images[0]
    body["timings"] = job.done()
    return pipeline.encode(job, body)


def _check_format(job: Job[DetectOptions]) -> None:
    options, number = job.options, len(job.upload.images)
    if options.format == "image" and job.upload.many:
        raise ProblemError(422, "format is 'image', which shows one image: send `file` or `image`")
    if options.image_ids is None:
        return
    if options.format != "coco":
        raise ProblemError(422, "image_ids is given, which goes with format=coco alone")
    if len(options.image_ids) != number:
        raise ProblemError(422, f"image_ids holds {len(options.image_ids)} for {number} images")


async def _detections(
    job: Job[DetectOptions], prepared: list[Prepared], params: DetectionParams
) -> list[dict[str, Any]]:
    detections = await pipeline.predict(job, prepared, params)
    as_shipped = params.is_shipped_with(job.model.card)
    job.service.metrics.detections(job.model, detections, as_shipped=as_shipped)
    pairs = zip(prepared, detections, strict=True)
    return [image_answer(one.geometry, each, params, job.model.card) for one, each in pairs]


async def _drawn_image(job: Job[DetectOptions], params: DetectionParams) -> Response:
    """Draw the detections; the decoded image counts in the memory budget until it is drawn."""
    [(name, content)] = job.upload.images
    async with pipeline.opened(job, name, content, keep=True) as prepared:
        [answer] = await _detections(job, [prepared], params)
        started, kind = perf_counter(), preferred_type(job.accept)
        file = await job.service.scheduler.decode(draw, prepared.image, answer["detections"], kind)
    job.service.metrics.stage("encode", perf_counter() - started)
    headers = {"X-Detections": str(len(answer["detections"])), "Vary": "Accept"}
    return Response(file, media_type=kind, headers=headers)


def coco_results(
    answers: Sequence[dict[str, Any]], image_ids: Sequence[int | str]
) -> list[dict[str, Any]]:
    """Convert detections to COCO results, one per detection; COCO counts categories from 1.

    Args:
        answers: One per image, as `service.api.pipeline.image_answer` returns them.
        image_ids: One per image.
    """
    return [
        {
            "image_id": image_id,
            "category_id": detection["label"] + 1,
            "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
            "score": detection["score"],
        }
        for image_id, answer in zip(image_ids, answers, strict=True)
        for detection in answer["detections"]
        for x1, y1, x2, y2 in [detection["box"]]
    ]


def draw(image: Image.Image, detections: Iterable[dict[str, Any]], kind: str) -> bytes:
    """Return the file of an RGB image with detections drawn in.

    Args:
        image: It is left as it is.
        detections: As in an answer.
        kind: `PNG` or `JPEG`, the media types.
    """
    labelled = [
        (one["box"], f"{one['class']} {one['score']:.2f}", one["label"]) for one in detections
    ]
    options = {"quality": 90} if kind == JPEG else {"compress_level": 1}
    buffer = io.BytesIO()
    draw_detections(image, labelled).save(buffer, kind.removeprefix("image/"), **options)
    return buffer.getvalue()


def preferred_type(accept: str) -> str:
    """Return `JPEG` if an `Accept` header prefers it to PNG, else `PNG`, which is lossless."""
    weights = parse_weights(accept)
    fallback = weights.get("image/*", weights.get("*/*", 0.0))
    return JPEG if weights.get(JPEG, fallback) > weights.get(PNG, fallback) else PNG


@router.post(
    "/thresholds/preview",
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
    return await pipeline.run(request, PreviewOptions, _preview_answer)


async def _preview_answer(job: Job[PreviewOptions]) -> Response:
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


class _FirstRoute(Route):
    """A route that puts itself into the scope, as FastAPI's routes do."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child_scope = super().matches(scope)
        return match, {**child_scope, "route": self}


def first_routes() -> list[BaseRoute]:
    """Return the routes of this module without FastAPI's dependencies, to be matched first.

    Those cost 2 to 3 % of the processor time of a request to a small detector; FastAPI's own routes
    of these paths are for the OpenAPI document alone.
    """
    return [
        _FirstRoute("/v1/detect", detect, methods=["POST"]),
        _FirstRoute("/v1/thresholds/preview", preview, methods=["POST"]),
    ]
