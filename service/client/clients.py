"""`Client` and `AsyncClient`: the same requests, with and without `await`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import anyio
import httpx
from anyio import to_thread

from service.client import requests
from service.client.answers import Model, ModelCard, Preview, Result, ServiceError
from service.client.requests import Call, DetectOptions, PreviewOptions

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")
ImageLike = TypeVar("ImageLike", bound="str | PathLike[str] | bytes | PIL.Image.Image")


class Client:
    """A client of a service. Safe to share between threads; close it, or use it in a `with`.

    Args:
        url: Address of the service, such as `http://127.0.0.1:8000`.
        token: Bearer token, if the service needs one.
        timeout: Seconds to wait for a connection and for each part of an answer; None waits
            without limit.
        retries: Limit on retries while the service is busy (429 or 503), each after the time in
            its `Retry-After`. Nothing else is retried.
        transport: An httpx transport in place of the network.
        sleep: Waits between retries.

    Raises:
        ValueError: The address is not an HTTP URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float | None = 30.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._http = httpx.Client(**requests.http_options(url, token, timeout), transport=transport)
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    @overload
    def detect(self, images: ImageLike, **options: Unpack[DetectOptions]) -> Result: ...

    @overload
    def detect(
        self,
        images: list[ImageLike] | tuple[ImageLike, ...],
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[DetectOptions],
    ) -> list[Result]: ...

    @overload
    def detect(
        self,
        images: list[ImageLike] | tuple[ImageLike, ...],
        *,
        return_errors: Literal[True],
        **options: Unpack[DetectOptions],
    ) -> list[Result | ServiceError]: ...

    def detect(self, images: Any, *, return_errors: bool = False, **options: Any) -> Any:
        """Find objects in an image, or in a list of them.

        Args:
            images: A path, the bytes of an image file, or a Pillow image, whose pixels are sent
                as they are in memory; or a list or tuple of these, sent as one request.
            return_errors: For a list, whether an image that could not be read has a
                `ServiceError` in its place. Otherwise the first such error is raised.
            **options: See `DetectOptions`.

        Returns:
            The result; for a list, one result per image in the same order.

        Raises:
            ServiceError: The service refused or did not answer.
            TypeError, ValueError: Not an image, or an empty list.
            OSError: A file cannot be read.
        """
        results = self._send(requests.detect(images, options))
        return requests.checked(results, return_errors=return_errors)

    def preview(self, image: ImageLike, **options: Unpack[PreviewOptions]) -> Preview:
        """Return all boxes of an image above a floor, and their number at each threshold.

        Args:
            image: A path, the bytes of an image file, or a Pillow image.
            **options: See `PreviewOptions`.

        Raises:
            ServiceError: The service refused or did not answer.
        """
        return self._send(requests.preview(image, options))

    def models(self) -> list[Model]:
        """Return the models that are served.

        Raises:
            ServiceError: The service refused or did not answer.
        """
        return self._send(requests.MODELS)

    def model(self, name: str, version: str | None = None) -> ModelCard:
        """Return a model's card: thresholds with their evidence, statistics, preprocessing.

        Raises:
            ServiceError: 404 if there is no such model; or there was no answer.
        """
        return self._send(requests.model(name, version))

    def ready(self) -> bool:
        """Whether the service answers requests: false while it starts, drains or is unreachable.

        Raises:
            ServiceError: It answered with another error, such as 401.
        """
        try:
            return self._send(requests.READY)
        except ServiceError as error:
            return requests.not_ready(error)

    def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                response = self._http.request(**call.arguments())
            except httpx.TransportError as error:
                raise requests.unanswered(error, self._timeout) from error
            wait = call.wait(response, attempt, self._retries)
            if wait is None:
                return call.result(response)
            self._sleep(wait)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncClient:
    """`Client` with `await`, on asyncio or trio. Close it, or use it in an `async with`.

    The arguments are those of `Client`; `transport` and `sleep` are asynchronous.

    Raises:
        ValueError: The address is not an HTTP URL.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float | None = 30.0,
        retries: int = 3,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[object]] = anyio.sleep,
    ) -> None:
        options = requests.http_options(url, token, timeout)
        self._http = httpx.AsyncClient(**options, transport=transport)
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    @overload
    async def detect(self, images: ImageLike, **options: Unpack[DetectOptions]) -> Result: ...

    @overload
    async def detect(
        self,
        images: list[ImageLike] | tuple[ImageLike, ...],
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[DetectOptions],
    ) -> list[Result]: ...

    @overload
    async def detect(
        self,
        images: list[ImageLike] | tuple[ImageLike, ...],
        *,
        return_errors: Literal[True],
        **options: Unpack[DetectOptions],
    ) -> list[Result | ServiceError]: ...

    async def detect(self, images: Any, *, return_errors: bool = False, **options: Any) -> Any:
        """Find objects in an image, or in a list of them: see `Client.detect`."""
        # Files are read, and Pillow images encoded, off the event loop.
        call = await to_thread.run_sync(requests.detect, images, options)
        return requests.checked(await self._send(call), return_errors=return_errors)

    async def preview(self, image: ImageLike, **options: Unpack[PreviewOptions]) -> Preview:
        """Return all boxes of an image above a floor: see `Client.preview`."""
        return await self._send(await to_thread.run_sync(requests.preview, image, options))

    async def models(self) -> list[Model]:
        """Return the models that are served: see `Client.models`."""
        return await self._send(requests.MODELS)

    async def model(self, name: str, version: str | None = None) -> ModelCard:
        """Return a model's card: see `Client.model`."""
        return await self._send(requests.model(name, version))

    async def ready(self) -> bool:
        """Whether the service answers requests: see `Client.ready`."""
        try:
            return await self._send(requests.READY)
        except ServiceError as error:
            return requests.not_ready(error)

    async def _send(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                response = await self._http.request(**call.arguments())
            except httpx.TransportError as error:
                raise requests.unanswered(error, self._timeout) from error
            wait = call.wait(response, attempt, self._retries)
            if wait is None:
                return call.result(response)
            await self._sleep(wait)
            attempt += 1

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()
