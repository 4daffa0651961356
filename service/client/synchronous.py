"""`Client`."""

from __future__ import annotations

import time
from collections.abc import Callable
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import httpx

from service.client import calls
from service.client.answers import Model, ModelCard, Preview, Result, ServiceError
from service.client.calls import Call, DetectOptions, PreviewOptions

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")
Image = TypeVar("Image", bound="str | PathLike[str] | bytes | PIL.Image.Image")


class Client:
    """Asks a service. Safe to share between threads; close it, or use it in a `with`.

    Args:
        url: Where the service is, such as `http://127.0.0.1:8000`.
        token: What it wants as a bearer token, if any.
        timeout: Seconds to wait for a connection, and for each piece of an answer; None for ever.
        retries: How often to ask again when the service is busy (429 or 503), after the time that
            its `Retry-After` says. Nothing else is asked twice.
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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._http = httpx.Client(**calls.http_options(url, token, timeout), transport=transport)
        self._timeout, self._retries, self._sleep = timeout, retries, sleep

    @overload
    def detect(
        self,
        images: str | PathLike[str] | bytes | PIL.Image.Image,
        **options: Unpack[DetectOptions],
    ) -> Result: ...

    @overload
    def detect(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        return_errors: Literal[False] = False,
        **options: Unpack[DetectOptions],
    ) -> list[Result]: ...

    @overload
    def detect(
        self,
        images: list[Image] | tuple[Image, ...],
        *,
        return_errors: Literal[True],
        **options: Unpack[DetectOptions],
    ) -> list[Result | ServiceError]: ...

    def detect(self, images: Any, *, return_errors: bool = False, **options: Any) -> Any:
        """Find objects in an image, or in a list of them.

        Args:
            images: A path, the bytes of an image file, or a Pillow image, whose pixels are taken
                as they are in memory; or a list or tuple of these, sent as one request.
            return_errors: Of a list, whether an image that could not be read has a `ServiceError`
                in its place; otherwise the first is raised.
            **options: As `DetectOptions` says.

        Returns:
            What was found; of a list, one result an image in the same order.

        Raises:
            ServiceError: The service refused or did not answer.
            TypeError, ValueError: It is no image, or an empty list.
            OSError: A file cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._ask(calls.detect_one(images, options))
        results = self._ask(calls.detect_many(images, options))
        return results if return_errors else calls.all_read(results)

    def preview(
        self,
        image: str | PathLike[str] | bytes | PIL.Image.Image,
        **options: Unpack[PreviewOptions],
    ) -> Preview:
        """Every box of an image from a floor on, and how many would stand at each threshold.

        Args:
            image: As for `detect`.
            **options: As `PreviewOptions` says.

        Raises:
            ServiceError: The service refused or did not answer.
        """
        return self._ask(calls.preview(image, options))

    def models(self) -> list[Model]:
        """The models that are served.

        Raises:
            ServiceError: The service refused or did not answer.
        """
        return self._ask(calls.models())

    def model(self, name: str, version: str | None = None) -> ModelCard:
        """A model's card: thresholds with the evidence behind each, statistics, preprocessing.

        Raises:
            ServiceError: 404 where there is none of that name; or there was no answer.
        """
        return self._ask(calls.model(name, version))

    def ready(self) -> bool:
        """Whether the service answers requests: not while it starts, drains or cannot be reached.

        Raises:
            ServiceError: It answered with something else, such as 401.
        """
        try:
            return self._ask(calls.ready())
        except ServiceError as error:
            if error.status in (None, 503):
                return False
            raise

    def _ask(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            try:
                response = self._http.request(**call.request())
            except httpx.TransportError as error:
                raise calls.unanswered(error, self._timeout) from error
            wait = calls.wait_before_retry(response, attempt, self._retries * call.retried)
            if wait is None:
                return calls.read(call, response)
            self._sleep(wait)
            attempt += 1

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
