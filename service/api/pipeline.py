"""The path of an uploaded image: read, decode, predict, encode.

`run` reads a request, and awaits its answer within the deadline. The answer calls `decode`,
`predict` and `encode`, in this order. Decoded images are held within the bytes that all requests
share.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import Request, Response
from PIL import Image

from export.card import DetectorCard
from ghm_triton.images.decode import decode as decode_file
from ghm_triton.images.header import (
    DamagedImageError,
    ImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
)
from ghm_triton.images.headers import measure
from service.api.state import ServiceState, service_state
from service.core.detections import DetectionParams, Detections, Options, read_options
from service.core.errors import ProblemError
from service.engine.deadline import while_wanted
from service.engine.session import ServedModel
from service.http.bodies import Upload, read_upload
from service.images import Geometry, prepare, prepare_bytes
from service.observability.metrics import Metrics

T = TypeVar("T")

_STATUS = {DamagedImageError: 400, ImageTooLargeError: 413, UnsupportedImageError: 415}
_REASONS = {413: "too_large", 504: "deadline"}

# The header of a larger file is read in a thread: it may have thousands of parts.
_LARGE_FILE = 2**18


@dataclass
class Job(Generic[Options]):
    """One request that has been read.

    Attributes:
        accept: The `Accept` header.
        started: Time at which reading began.
        timings: Milliseconds of each stage.
    """

    service: ServiceState
    model: ServedModel
    upload: Upload
    options: Options
    accept: str
    started: float
    timings: dict[str, float] = field(default_factory=dict)

    def done(self) -> dict[str, float]:
        """Return the milliseconds of each stage and of the whole, rounded to microseconds."""
        total = (perf_counter() - self.started) * 1000
        return {name: round(ms, 3) for name, ms in {**self.timings, "total_ms": total}.items()}


@dataclass(frozen=True)
class Prepared:
    """A decoded image, ready for the model.

    Attributes:
        row: One row of the model's input, as `service.images.prepare` returns it.
        geometry: Maps boxes back to the image.
        image: The upright image, if it was kept.
        seconds: Time spent decoding.
    """

    row: npt.NDArray[Any]
    geometry: Geometry
    image: Image.Image | None
    seconds: float


async def run(
    request: Request,
    kind: type[Options],
    answer: Callable[[Job[Options]], Coroutine[Any, Any, Response]],
) -> Response:
    """Read a request and await its answer.

    Args:
        request: The request.
        kind: The model of its options.
        answer: Cancelled at the deadline, or when the client has gone.

    Raises:
        ProblemError: The request is malformed or refused, or too late.
    """
    service = service_state(request)
    with counted(service.metrics):
        service.scheduler.check_room()
        job = await _read(request, service, kind)
        with service.scheduler.admit(len(job.upload.images)):
            return await while_wanted(request, answer(job), service.settings.deadline_ms)


@contextmanager
def counted(metrics: Metrics) -> Iterator[None]:
    """Count the requests refused within the context, by reason."""
    try:
        yield
    except ProblemError as error:
        if error.status in _REASONS:
            metrics.rejected(_REASONS[error.status])
        raise


async def _read(request: Request, service: ServiceState, kind: type[Options]) -> Job[Options]:
    settings, started = service.settings, perf_counter()
    upload = await read_upload(
        request, settings.max_upload_bytes, settings.max_images, service.scheduler.decode
    )
    service.metrics.stage("read", perf_counter() - started)
    options = read_options([*request.query_params.multi_items(), *upload.fields], kind)
    model = service.registry.get(options.model, options.version)
    job = Job(service, model, upload, options, request.headers.get("accept", ""), started)
    job.timings["read_ms"] = (perf_counter() - started) * 1000
    return job


async def decode(job: Job[Options]) -> list[Prepared | ProblemError]:
    """Decode the images of a request, as many at a time as there are decoders.

    Returns:
        For each image, in order, its row or the reason why it could not be read.

    Raises:
        ProblemError: The first image's, if no image could be read.
    """

    async def decode_one(name: str, content: bytes) -> Prepared | ProblemError:
        try:
            async with opened(job, name, content) as prepared:
                return prepared
        except ProblemError as problem:
            return problem

    results = await asyncio.gather(*[decode_one(*image) for image in job.upload.images])
    problems = [result for result in results if isinstance(result, ProblemError)]
    if len(problems) == len(results):
        raise problems[0]
    return results


@asynccontextmanager
async def opened(
    job: Job[Options], name: str, content: bytes, *, keep: bool = False
) -> AsyncIterator[Prepared]:
    """Decode one image, and hold its share of the memory budget within the context.

    Args:
        job: The request.
        name: Name of the image for error messages.
        content: The file.
        keep: Whether to keep the decoded image beside the model's input.

    Raises:
        ProblemError: 400, 413 or 415, naming the image.
    """
    service = job.service
    with _naming(name):
        header = await _measured(service, content)
    needed = header.decoded_bytes + prepare_bytes(job.model.card)
    async with service.decoded.use(min(needed, service.decoded.total)):
        with _naming(name):
            prepared = await _to_the_end(service, _prepare, content, header, job.model.card, keep)
        service.metrics.stage("decode", prepared.seconds)
        milliseconds = job.timings.get("decode_ms", 0.0) + prepared.seconds * 1000
        job.timings["decode_ms"] = milliseconds
        yield prepared


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ProblemError(_STATUS[type(error)], f"{name}: {error}") from error


async def _measured(service: ServiceState, content: bytes) -> ImageHeader:
    limit, budget = service.settings.max_pixels, service.decoded.total
    if len(content) > _LARGE_FILE:
        header = await service.scheduler.decode(measure, content, limit)
    else:
        header = measure(content, limit)
    if header.decoded_bytes > budget:
        raise ImageTooLargeError(
            f"decoding its {header.width} x {header.height} pixels takes"
            f" {header.decoded_bytes} bytes; there are {budget} for images"
        )
    return header


def _prepare(content: bytes, header: ImageHeader, card: DetectorCard, keep: bool) -> Prepared:
    started = perf_counter()
    image = decode_file(content, header.width * header.height, header)
    row, geometry = prepare(image, card)
    return Prepared(row, geometry, image if keep else None, perf_counter() - started)


async def _to_the_end(service: ServiceState, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a decoder's thread; if cancelled, return only when it has ended.

    Its memory must not go back to the budget before it is free.
    """
    wanted = True

    def work() -> T:
        if not wanted:
            raise asyncio.CancelledError
        return function(*arguments)

    running = asyncio.ensure_future(service.scheduler.decode(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        wanted = False  # if it has not begun, it need not
        await asyncio.wait([running])
        raise


async def predict(
    job: Job[Options], prepared: list[Prepared], params: DetectionParams
) -> list[Detections]:
    """Run the model on the images of a request, together with those of other requests.

    Returns:
        The detections of each image, in pixels of the model's input.
    """
    started = perf_counter()
    rows = [one.row for one in prepared]
    batch = rows[0][None] if len(rows) == 1 else np.stack(rows)
    outputs = await job.service.scheduler.run(job.model, batch, params)
    job.timings["inference_ms"] = (perf_counter() - started) * 1000
    return [outputs.image(index) for index in range(len(rows))]


def image_answer(
    geometry: Geometry, detections: Detections, params: DetectionParams, card: DetectorCard
) -> dict[str, Any]:
    """Return the `image` and `detections` of an answer, in pixels of the image.

    Args:
        geometry: Maps boxes back to the image.
        detections: In pixels of the model's input.
        params: The parameters in force for the request.
        card: The model's card.
    """
    number = params.max_detections
    boxes = geometry.to_image(detections.boxes[:number]).round(3).tolist()
    scores, labels = detections.scores[:number].tolist(), detections.labels[:number].tolist()
    thresholds = params.class_thresholds.tolist()
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
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ],
    }


def failed_answer(problem: ProblemError) -> dict[str, Any]:
    """Return the `error` that takes the place of detections for an image that was not read."""
    title = HTTPStatus(problem.status).phrase
    return {"error": {"status": problem.status, "title": title, "detail": problem.detail}}


def encode(job: Job[Options], body: object) -> Response:
    """Return a body as a JSON response."""
    started = perf_counter()
    response = Response(orjson.dumps(body), media_type="application/json")
    job.service.metrics.stage("encode", perf_counter() - started)
    return response
