"""`AsyncClient`: `Client` with `await`, on asyncio or trio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import anyio
import httpx
from anyio import to_thread

from service.client import calls
from service.client.answers import Model, ModelCard, Preview, Result, ServiceError
from service.client.calls import Call, DetectOptions, PreviewOptions

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")
Image = TypeVar("Image", bound="str | PathLike[str] | bytes | PIL.Image.Image")


class AsyncClient:
    """Asks a service; all is as `Client` says. Close it, or use it in an `async with`.

    Args:
        url: Where the service is.
        token: What it wants as a bearer token, if any.
        timeout: Seconds to wait for a connection, and for each piece of an answer; None for ever.
        retries: How often to ask again when the service is busy (429 or 503).
        transport: In place of the network, as httpx has it.
        sleep: Waits between attempts.

    Raises:
        ValueError: The url is not one of HTTP.
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
        options = calls.http_options(url, token, timeout)
        self._http = httpx.AsyncClient(**options, transport=transport)
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    @overload
    async def detect(
        self,
        images: str | PathLike[str] | bytes | PIL.Image.Image,
        **options: Unpack[DetectOptions],
    ) -> Result: ...

    @overload
    async def detect(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[DetectOptions],
    ) -> list[Result]: ...

    @overload
    async def detect(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        return_errors: Literal[True],
        **options: Unpack[DetectOptions],
    ) -> list[Result | ServiceError]: ...

    async def detect(self, images: Any, *, return_errors: bool = False, **options: Any) -> Any:
        """Find objects in an image, or in a list of them: see `Client.detect`."""
        # Files are read, and Pillow images encoded, off the event loop.
        if not isinstance(images, list | tuple):
            return await self._ask(await _aside(calls.detect_one, images, options))
        results = await self._ask(await _aside(calls.detect_many, images, options))
        return results if return_errors else calls.all_read(results)

    async def preview(
        self,
        image: str | PathLike[str] | bytes | PIL.Image.Image,
        **options: Unpack[PreviewOptions],
    ) -> Preview:
        """Every box of an image from a floor on: see `Client.preview`."""
        return await self._ask(await _aside(calls.preview, image, options))

    async def models(self) -> list[Model]:
        """The models that are served: see `Client.models`."""
        return await self._ask(calls.models())

    async def model(self, name: str, version: str | None = None) -> ModelCard:
        """A model's card: see `Client.model`."""
        return await self._ask(calls.model(name, version))

    async def ready(self) -> bool:
        """Whether the service answers requests: see `Client.ready`."""
        try:
            return await self._ask(calls.ready())
        except ServiceError as error:
            if error.status in (None, 503):
                return False
            raise

    async def _ask(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                response = await self._http.request(**call.request())
            except httpx.TransportError as error:
                raise calls.unanswered(error, self._timeout) from error
            wait = calls.wait_before_retry(response, attempt, self._retries * call.retried)
            if wait is None:
                return calls.read(call, response)
            await self._sleep(wait)
            attempt += 1

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()


async def _aside(
    build: Callable[[Any, Mapping[str, Any]], Call[T]], images: Any, options: Mapping[str, Any]
) -> Call[T]:
    return await to_thread.run_sync(partial(build, images, options))
