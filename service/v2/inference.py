"""One inference request: read, check, run with others, encode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

import numpy as np
from fastapi import Request, Response

from export.card import INPUT, IOU_INPUT, THRESHOLDS_INPUT, DetectorCard
from service.api.pipeline import counted
from service.api.state import ServiceState, service_state
from service.core.detections import DetectionParams, Outputs
from service.core.errors import ProblemError
from service.core.settings import LARGEST_BATCH, Settings
from service.engine.deadline import while_wanted
from service.engine.session import ServedModel
from service.http.bodies import read_body
from service.http.encodings import compress
from service.v2.codec import HEADER, InferRequest, encode_answer, parse_request
from service.v2.signature import Signature
from service.v2.statistics import ModelStatistics, statistics_of
from service.v2.tensors import Array, malformed

# In standard deviations from the mean. Letterboxed pixels are within 3 of it; numbers far beyond
# are no image, and a network overflows on them.
LARGEST_PIXEL = 1000.0

_FLOAT_BYTES = 4

# Answers of more bytes are encoded in a thread.
_LARGE = 2**18


async def infer(request: Request, model: ServedModel) -> Response:
    """Answer an inference request.

    Raises:
        ProblemError: 400 if the request is malformed, 413 if it is too large, 415 for an unknown
            compression, 429 if too many wait, 504 past the deadline or the request's `timeout`.
        ModelError: The model failed.
    """
    service = service_state(request)
    statistics = statistics_of(model)
    with statistics.request(), counted(service.metrics):
        service.scheduler.check_room()
        with _stage(service, statistics, "read", "compute_input"):
            body = await read_body(
                request, service.settings.max_upload_bytes, service.scheduler.decode
            )
            asked, params = await service.scheduler.decode(
                read, body, _header_length(request), model.card, service.settings
            )
        images = asked.inputs[INPUT]
        limit_ms = min(service.settings.deadline_ms, asked.timeout_ms or math.inf)
        with statistics.inference() as on_start, service.scheduler.admit(len(images)):
            work = _run(service, model, images, params, on_start)
            outputs = await while_wanted(request, work, limit_ms)
        accepted = request.headers.get("accept-encoding", "")
        with _stage(service, statistics, "encode", "compute_output"):
            if outputs.boxes.nbytes > _LARGE:
                response = await service.scheduler.decode(_answer, asked, outputs, model, accepted)
            else:
                response = _answer(asked, outputs, model, accepted)
        statistics.images += len(images)
    detections = [outputs.image(index) for index in range(len(outputs))]
    service.metrics.detections(model, detections, as_shipped=params is None)
    return response


async def _run(
    service: ServiceState,
    model: ServedModel,
    images: Array,
    params: DetectionParams | None,
    on_start: Callable[[float], None],
) -> Outputs:
    """Run a batch in parts no larger than those of other requests.

    A few bytes can stand for the largest batch, whose inference takes gigabytes of memory.
    """
    step = service.settings.max_images
    async with service.decoded.use(_needed_bytes(images.shape, model.card, step)):
        parts = [
            await service.scheduler.run(model, images[start : start + step], params, on_start)
            for start in range(0, len(images), step)
        ]
    if len(parts) == 1:
        return parts[0]
    return Outputs(
        **{name: np.concatenate([vars(p)[name] for p in parts]) for name in vars(parts[0])}
    )


@contextmanager
def _stage(
    service: ServiceState, statistics: ModelStatistics, stage: str, part: str
) -> Iterator[None]:
    """Time a part of a request for the metrics and for the protocol's statistics."""
    started = perf_counter()
    with statistics.part(part):
        yield
    service.metrics.stage(stage, perf_counter() - started)


def _header_length(request: Request) -> str | None:
    values = set(request.headers.getlist(HEADER))
    if len(values) > 1:
        raise malformed(f"{HEADER} is given as {' and as '.join(sorted(values))}")
    return values.pop() if values else None


def read(
    body: bytes, header_length: str | None, card: DetectorCard, settings: Settings
) -> tuple[InferRequest, DetectionParams | None]:
    """Parse and check a request. Slow enough to run off the event loop.

    Args:
        body: The whole body, inflated.
        header_length: As for `parse_request`.
        card: The model's card.
        settings: Their `max_pixels`, `max_images` and `max_decoded_bytes`.

    Returns:
        The request, and the parameters that it sets; None if it sets none.

    Raises:
        ProblemError: 400 for whatever the protocol or the model does not allow, 413 for images
            that would take too much memory to prepare.
    """
    asked = parse_request(body, header_length, Signature.of(card))
    images = asked.inputs[INPUT]
    if len(images) > LARGEST_BATCH:
        raise malformed(
            f"input {INPUT} is a batch of {len(images)}; at most {LARGEST_BATCH} images go into one"
        )
    if card.input == "uint8":
        _check_size(images.shape, card, settings)
    else:
        _check_pixels(images)
    return asked, _params(asked, card)


def _check_size(shape: tuple[int, ...], card: DetectorCard, settings: Settings) -> None:
    batch, height, width, _ = shape
    if height * width > settings.max_pixels:
        raise ProblemError(
            413,
            f"input {INPUT} is {width} x {height}, more than the {settings.max_pixels} pixels that"
            " are read here",
        )
    needed = _needed_bytes(shape, card, settings.max_images)
    if needed > settings.max_decoded_bytes:
        raise ProblemError(
            413,
            f"input {INPUT} is {width} x {height}: to resize {batch} such pictures takes {needed}"
            f" bytes, more than the {settings.max_decoded_bytes} that are spent here",
        )


def _needed_bytes(shape: tuple[int, ...], card: DetectorCard, at_once: int) -> int:
    """Return the memory that a batch, or its part that runs at once, takes before the network.

    A graph that takes images of any size resizes them with one window of pixels for each pixel of
    the frame's width, in every row of the image and of the frame.
    """
    if card.input == "float32":
        return math.prod(shape) * _FLOAT_BYTES
    frame = card.preprocessing
    batch, height, width, colours = shape
    shrinks = max(1.0, height / frame.height, width / frame.width)
    rows = min(batch, at_once) * (height + frame.height)
    return round(rows * frame.width * shrinks) * colours * _FLOAT_BYTES


def _check_pixels(images: Array) -> None:
    # Both comparisons are false for NaN.
    if not (images.min() >= -LARGEST_PIXEL and images.max() <= LARGEST_PIXEL):
        wrong = images[~(np.abs(images) <= LARGEST_PIXEL)][0]
        raise malformed(
            f"input {INPUT} holds {wrong}; pixels are normalised by the card's mean and std, and"
            f" must be within {LARGEST_PIXEL:g} of 0"
        )


def _params(asked: InferRequest, card: DetectorCard) -> DetectionParams | None:
    thresholds = asked.inputs.get(THRESHOLDS_INPUT)
    iou = asked.inputs.get(IOU_INPUT)
    if thresholds is None and iou is None:
        return None
    if thresholds is None:
        thresholds = np.array(card.class_thresholds, np.float32)
    elif not (np.isfinite(thresholds).all() and thresholds.min() >= 0):
        raise malformed(
            f"input {THRESHOLDS_INPUT} must be finite and not negative, got {thresholds.tolist()}"
        )
    overlap = card.iou_threshold if iou is None else float(iou[0])
    if not 0 <= overlap <= 1:  # false for NaN too
        raise malformed(f"input {IOU_INPUT} must be in [0, 1], got {overlap}")
    return DetectionParams(thresholds, overlap, card.max_detections)


def _answer(asked: InferRequest, outputs: Outputs, model: ServedModel, accepted: str) -> Response:
    body, json_length = encode_answer(
        asked.outputs, vars(outputs), (model.name, model.version), asked.id
    )
    body, coding = compress(body, accepted)
    headers = {"Vary": "Accept-Encoding"}
    if coding is not None:
        headers["Content-Encoding"] = coding
    if json_length is not None:
        headers[HEADER] = str(json_length)
    kind = "application/json" if json_length is None else "application/octet-stream"
    return Response(body, headers=headers, media_type=kind)
