"""From a request to rows of a model's input, within the bytes that all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import Request
from PIL import Image

from export.card import DetectorCard
from service.api.state import ServiceState
from service.core.errors import ProblemError
from service.core.params import ModelOptions, read_options
from service.http.uploads import Upload, read_upload
from service.images.decode import Geometry, decode, prepare
from service.images.headers import measure
from service.images.headers.base import (
    DamagedImageError,
    ImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
)
from service.observability.metrics import Metrics

T = TypeVar("T")
Options = TypeVar("Options", bound=ModelOptions)

_STATUS = {DamagedImageError: 400, ImageTooLargeError: 413, UnsupportedImageError: 415}
_REASONS = {413: "too_large", 504: "deadline"}

# The header of a larger file is read in another thread: it may have thousands of parts.
_LARGE_FILE = 2**18


@dataclass(frozen=True)
class Prepared:
    """One image, as the model takes it.

    Attributes:
        row: As `service.images.decode.prepare` returns it.
        geometry: What takes boxes back to the image.
        image: The upright image, where it was asked for.
        seconds: How long that took.
    """

    row: npt.NDArray[Any]
    geometry: Geometry
    image: Image.Image | None
    seconds: float


async def read_request(
    request: Request, service: ServiceState, kind: type[Options]
) -> tuple[Upload, Options]:
    """Read a request's images and options, wherever they are.

    Raises:
        ProblemError: As `service.http.uploads.read_upload` and
            `service.core.params.read_options`.
    """
    told = service.settings
    started = perf_counter()
    upload = await read_upload(
        request, told.max_upload_bytes, told.max_images, service.scheduler.decode
    )
    service.metrics.stage("read", perf_counter() - started)
    return upload, read_options([*request.query_params.multi_items(), *upload.fields], kind)


@contextmanager
def counted(metrics: Metrics) -> Iterator[None]:
    """Count the requests that are refused in here, by reason."""
    try:
        yield
    except ProblemError as error:
        if error.status in _REASONS:
            metrics.rejected(_REASONS[error.status])
        raise


@asynccontextmanager
async def opened(
    service: ServiceState, card: DetectorCard, name: str, content: bytes, *, keep: bool = False
) -> AsyncIterator[Prepared]:
    """Decode an image and have its memory counted for as long as it is used.

    Args:
        service: Its decoders and its budget are used.
        card: Of the model that the image is for.
        name: Of the image, for use in errors.
        content: The file.
        keep: Whether the image itself is wanted too.

    Raises:
        ProblemError: 400, 413 or 415, naming the image.
    """
    header = await _measured(service, name, content)
    async with service.decoded.use(header.decoded_bytes):
        prepared = await _to_the_end(service, _prepare, name, content, header, card, keep)
        service.metrics.stage("decode", prepared.seconds)
        yield prepared


async def prepare_all(
    service: ServiceState, card: DetectorCard, images: list[tuple[str, bytes]]
) -> list[Prepared | ProblemError]:
    """Decode the images of a request, as many at a time as there are decoders.

    Returns:
        For each image its row, or why there is none.
    """

    async def one(name: str, content: bytes) -> Prepared | ProblemError:
        try:
            async with opened(service, card, name, content) as prepared:
                return prepared
        except ProblemError as problem:
            return problem

    if len(images) == 1:
        return [await one(*images[0])]
    return list(await asyncio.gather(*[one(*image) for image in images]))


def batch_of(prepared: list[Prepared]) -> npt.NDArray[Any]:
    """The rows of images as a batch."""
    rows = [one.row for one in prepared]
    return rows[0][None] if len(rows) == 1 else np.stack(rows)


async def _measured(service: ServiceState, name: str, content: bytes) -> ImageHeader:
    most = service.settings.max_pixels
    try:
        if len(content) > _LARGE_FILE:
            header = await service.scheduler.decode(measure, content, most)
        else:
            header = measure(content, most)
    except ImageError as error:
        raise _problem(name, error) from error
    if header.decoded_bytes > service.decoded.total:
        raise ProblemError(
            413,
            f"{name}: decoding its {header.width} x {header.height} pixels takes"
            f" {header.decoded_bytes} bytes; there are {service.decoded.total} for images",
        )
    return header


def _prepare(
    name: str, content: bytes, header: ImageHeader, card: DetectorCard, keep: bool
) -> Prepared:
    started = perf_counter()
    try:
        image = decode(content, header.width * header.height, header)
    except ImageError as error:
        raise _problem(name, error) from error
    row, geometry = prepare(image, card)
    return Prepared(row, geometry, image if keep else None, perf_counter() - started)


def _problem(name: str, error: ImageError) -> ProblemError:
    return ProblemError(_STATUS[type(error)], f"{name}: {error}")


async def _to_the_end(service: ServiceState, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a decoder's thread; if cancelled, only return once it is over.

    The memory it uses is given back to the budget afterwards, and so not before it is free.
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
        wanted = False  # where it has not begun, it need not
        await asyncio.wait([running])
        raise
