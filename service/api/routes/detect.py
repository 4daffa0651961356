"""`POST /v1/detect`: images in, objects out."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service.api.formats import JPEG, PNG, coco_results, drawn, preferred_kind
from service.api.pipeline import Prepared, batch_of, counted, opened, prepare_all, read_request
from service.api.request_body import query_parameters, request_body
from service.api.responses import failed_answer, image_answer
from service.api.state import ServiceState, service_state
from service.api.timer import Timer
from service.core.detections import DetectionParams
from service.core.errors import ProblemError, documented
from service.core.params import DetectOptions, resolve
from service.core.schema import CocoResult, DetectManyResponse, DetectResponse
from service.engine.deadline import while_wanted
from service.engine.session import ServedModel
from service.http.uploads import Upload

router = APIRouter(prefix="/v1", tags=["detection"])

_FILE = {"schema": {"type": "string", "format": "binary"}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was found: as JSON, as COCO's results, or drawn into the image",
        "content": {PNG: _FILE, JPEG: _FILE},
        "headers": {
            "X-Detections": {
                "description": "With `format=image`, how many objects are drawn",
                "schema": {"type": "integer", "minimum": 0},
            }
        },
    },
    **documented(400, 404, 408, 413, 415, 422, 429, 500, 503, 504),
}


@router.post(
    "/detect",
    summary="Find objects in images",
    response_model=DetectResponse | DetectManyResponse | list[CocoResult],
    responses=_ANSWERS,
    openapi_extra={
        "requestBody": request_body("/v1/detect", DetectOptions, many=True),
        "parameters": query_parameters(DetectOptions),
    },
)
async def detect(request: Request) -> Response:
    """Find objects in one image or several.

    Send an image as the body, or one `file` of a form, or base64 as `image` of a JSON object, and
    get one object. Send `files` or `images` and get a list `results`, where an image that cannot
    be read has an `error` in its place; where none can, the request fails with the first one's
    status, as it does with `format=coco` as soon as one cannot. Bodies may be compressed
    (`Content-Encoding: gzip` or `deflate`). Options are query parameters, form fields, or members
    of the JSON object.

    A detection stands if its score reaches the threshold of its class: the file's own, or the
    one that this request sets. Each detection names the threshold it passed.
    """
    service = service_state(request)
    with counted(service.metrics):
        service.scheduler.check_room()
        timer = Timer()
        upload, options = await read_request(request, service, DetectOptions)
        model = service.registry.get(options.model, options.version)
        wanted = resolve(options, model.card)
        _check_format(options, upload)
        timer.lap("read_ms")
        work = _Work(service, model, upload, wanted, timer)
        with service.scheduler.admit(len(upload.images)):
            answer = work.answer(options, request.headers.get("accept", ""))
            return await while_wanted(request, answer, service.settings.deadline_ms)


def _check_format(options: DetectOptions, upload: Upload) -> None:
    number = len(upload.images)
    if options.format == "image" and upload.many:
        raise ProblemError(422, "format is 'image', which shows one image: send `file` or `image`")
    ids = options.image_ids
    if ids is not None and options.format != "coco":
        raise ProblemError(422, "image_ids is given, which goes with format=coco alone")
    if ids is not None and len(ids) != number:
        raise ProblemError(422, f"image_ids holds {len(ids)} for {number} images")


class _Work:
    """What one request asks for, once it is read."""

    def __init__(
        self,
        service: ServiceState,
        model: ServedModel,
        upload: Upload,
        wanted: DetectionParams,
        timer: Timer,
    ) -> None:
        self.service = service
        self.model = model
        self.upload = upload
        self.wanted = wanted
        self.timer = timer

    async def answer(self, options: DetectOptions, accept: str) -> Response:
        if options.format == "image":
            return await self._as_image(preferred_kind(accept))
        if options.format == "coco":
            return await self._as_coco(options.image_ids)
        return await self._as_json()

    async def _as_json(self) -> Response:
        results = await self._results()
        answers = [failed_answer(r) if isinstance(r, ProblemError) else r for r in results]
        started = perf_counter()
        body: dict[str, Any] = {"model": self.model.name, "version": self.model.version}
        body |= {"results": answers} if self.upload.many else answers[0]
        body["timings"] = self.timer.done()
        return self._encoded(started, body)

    async def _as_coco(self, image_ids: tuple[int | str, ...] | None) -> Response:
        results = await self._results()
        answers = []
        for result in results:
            if isinstance(result, ProblemError):
                raise result
            answers.append(result)
        ids = range(len(answers)) if image_ids is None else image_ids
        started = perf_counter()
        return self._encoded(started, coco_results(answers, ids))

    async def _as_image(self, kind: str) -> Response:
        """The image stays in memory, and counted there, until the boxes are drawn into it."""
        [(name, content)] = self.upload.images
        card = self.model.card
        async with opened(self.service, card, name, content, keep=True) as prepared:
            self.timer.add("decode_ms", prepared.seconds)
            [answer] = await self._found([prepared])
            started = perf_counter()
            found = answer["detections"]
            file = await self.service.scheduler.decode(drawn, prepared.image, found, kind)
        self.service.metrics.stage("encode", perf_counter() - started)
        headers = {"X-Detections": str(len(found)), "Vary": "Accept"}
        return Response(file, media_type=kind, headers=headers)

    async def _results(self) -> list[dict[str, Any] | ProblemError]:
        """For each image what was found, or why it could not be read.

        Raises:
            ProblemError: The first one's, where none could be read.
        """
        everything = await prepare_all(self.service, self.model.card, self.upload.images)
        good = [one for one in everything if isinstance(one, Prepared)]
        self.timer.add("decode_ms", sum(one.seconds for one in good))
        if not good:
            raise next(one for one in everything if isinstance(one, ProblemError))
        found = iter(await self._found(good))
        return [one if isinstance(one, ProblemError) else next(found) for one in everything]

    async def _found(self, prepared: list[Prepared]) -> list[dict[str, Any]]:
        started = perf_counter()
        outputs = await self.service.scheduler.run(self.model, batch_of(prepared), self.wanted)
        self.timer.add("inference_ms", perf_counter() - started)
        found = [outputs.image(place) for place in range(len(prepared))]
        as_shipped = self.wanted.is_shipped_with(self.model.card)
        self.service.metrics.detections(self.model, found, as_shipped=as_shipped)
        return [
            image_answer(one.geometry, detections, self.wanted, self.model.card)
            for one, detections in zip(prepared, found, strict=True)
        ]

    def _encoded(self, started: float, body: object) -> Response:
        response = Response(orjson.dumps(body), media_type="application/json")
        self.service.metrics.stage("encode", perf_counter() - started)
        return response
