"""`POST /v1/detect`: images in, objects out."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request, Response

from export.contract import DetectorCard
from service.answers import image_answer
from service.body import Upload, read_upload
from service.deadline import while_wanted
from service.images import (
    DamagedImageError,
    Geometry,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
    decode,
    prepare,
)
from service.model import ServedModel
from service.options import Wanted, form_properties, parse_options, query_parameters, resolve
from service.problems import ProblemError, documented
from service.schemas import DetectManyResponse, DetectResponse
from service.state import ServiceState, service_state

router = APIRouter(prefix="/v1", tags=["detection"])

_STATUS = {DamagedImageError: 400, ImageTooLargeError: 413, UnsupportedImageError: 415}

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "One image; the answer is one object",
                    },
                    "files": {
                        "type": "array",
                        "items": {"type": "string", "format": "binary"},
                        "description": "Any number of images; the answer has a list `results`",
                    },
                    **form_properties(),
                },
            }
        },
        "image/*": _BINARY,
        "application/octet-stream": _BINARY,
    },
}


@dataclass(frozen=True)
class _Timer:
    """Milliseconds of the parts of a request."""

    started: float
    parts: dict[str, float]

    def done(self) -> dict[str, float]:
        total = (perf_counter() - self.started) * 1000
        return {name: round(ms, 3) for name, ms in {**self.parts, "total_ms": total}.items()}


@router.post(
    "/detect",
    summary="Find objects in images",
    response_model=DetectResponse | DetectManyResponse,
    responses=documented(400, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={"requestBody": _REQUEST_BODY, "parameters": query_parameters()},
)
async def detect(request: Request) -> Response:
    """Find objects in one image or several.

    Send an image as the body, or one `file` of a form, and get one object; send `files` and get
    a list `results`. Options are query parameters or form fields.

    A detection stands if its score reaches the threshold of its class: the file's own, or the
    one that this request sets. Each detection names the threshold it passed.
    """
    timer = _Timer(perf_counter(), {})
    service = service_state(request)
    model = service.registry.get()
    service.scheduler.check_room()
    settings = service.settings
    upload = await read_upload(request, settings.max_upload_bytes, settings.max_images)
    options = parse_options([*request.query_params.multi_items(), *upload.fields])
    wanted = resolve(options, model.card)
    timer.parts["read_ms"] = (perf_counter() - timer.started) * 1000
    with service.scheduler.admit(len(upload.images)):
        answers = await while_wanted(
            request, _answer(service, model, upload, wanted, timer), settings.deadline_ms
        )
    body: dict[str, Any] = {"model": model.card.name}
    body |= {"results": answers} if upload.many else answers[0]
    body["timings"] = timer.done()
    return Response(orjson.dumps(body), media_type="application/json")


async def _answer(
    service: ServiceState, model: ServedModel, upload: Upload, wanted: Wanted, timer: _Timer
) -> list[dict[str, Any]]:
    batch, geometries = await _prepare(service, model, upload, timer)
    started = perf_counter()
    outputs = await service.scheduler.run(model, batch, wanted)
    timer.parts["inference_ms"] = (perf_counter() - started) * 1000
    return [
        image_answer(geometry, outputs.image(place), wanted, model.card)
        for place, geometry in enumerate(geometries)
    ]


async def _prepare(
    service: ServiceState, model: ServedModel, upload: Upload, timer: _Timer
) -> tuple[npt.NDArray[Any], list[Geometry]]:
    """Decode and letterbox every image, off the event loop."""
    rows = []
    timer.parts["decode_ms"] = 0.0
    for name, content in upload.images:
        row, geometry, milliseconds = await service.scheduler.decode(
            _decode_one, name, content, service.settings.max_pixels, model.card
        )
        rows.append((row, geometry))
        timer.parts["decode_ms"] += milliseconds
    return np.stack([row for row, _ in rows]), [geometry for _, geometry in rows]


def _decode_one(
    name: str, content: bytes, max_pixels: int, card: DetectorCard
) -> tuple[npt.NDArray[Any], Geometry, float]:
    started = perf_counter()
    try:
        image = decode(content, max_pixels)
    except ImageError as error:
        raise ProblemError(_STATUS[type(error)], f"{name}: {error}") from error
    row, geometry = prepare(image, card)
    return row, geometry, (perf_counter() - started) * 1000
