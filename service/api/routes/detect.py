"""`POST /v1/detect`: objects in one image or several."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request, Response

from service.api import pipeline
from service.api.drawing import JPEG, PNG, draw, preferred_type
from service.api.openapi import options_extra, problems
from service.api.pipeline import Job, Prepared, failed_answer, image_answer
from service.core.detections import DetectionParams
from service.core.errors import ProblemError
from service.core.params import DetectOptions, resolve
from service.core.schema import CocoResult, DetectManyResponse, DetectResponse

router = APIRouter(prefix="/v1", tags=["detection"])

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
    """Convert detections to COCO results.

    Args:
        answers: One per image, as `service.api.pipeline.image_answer` returns them.
        image_ids: One per image.

    Returns:
        One object per detection: `image_id`, `category_id` (the label + 1: COCO counts from 1),
        `bbox` as x, y, width and height in pixels, and `score`.
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
