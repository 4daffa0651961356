"""The requests that both clients send, and the reading of their answers, without any I/O."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import version as installed
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx

from service.client import answers
from service.client.answers import ServiceError

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")

_BUSY = frozenset({429, 503})
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 30.0
_JITTER = 0.25  # share of a wait added at random, so that clients refused together spread out

# Modes of Pillow that PNG can hold; CMYK is sent as TIFF.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


class ModelOptions(TypedDict, total=False):
    """The choice of a model: `model` by name and `version`, where several are served."""

    model: str | None
    version: str | None


class DetectOptions(ModelOptions, total=False):
    """Options of `detect`.

    Attributes:
        threshold: Score in [0, 1] that a detection of any class must reach, in place of the
            file's thresholds.
        thresholds: The same per class.
        classes: Only these classes.
        iou: IoU in [0, 1] above which NMS drops the lower-scored box of a class.
        max_detections: The most detections per image, the best first.
    """

    threshold: float | None
    thresholds: Mapping[str, float] | None
    classes: str | Iterable[str] | None
    iou: float | None
    max_detections: int | None


class PreviewOptions(ModelOptions, total=False):
    """Options of `preview`.

    Attributes:
        floor: The lowest score of interest, in [0, 1].
        steps: Thresholds to count at.
        classes: Only these classes.
        iou: IoU in [0, 1] above which NMS drops the lower-scored box of a class.
    """

    floor: float | None
    steps: Iterable[float] | None
    classes: str | Iterable[str] | None
    iou: float | None


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and the function that reads its answer.

    Attributes:
        method: HTTP method.
        path: Path below the service's address.
        read: Reads the body's JSON, with `request_id` added.
        options: Fields of the form, or of the query if there are no files.
        files: Names of form fields, each with a file's name and bytes.
        retried: Whether to retry while the service is busy.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    options: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[tuple[str, tuple[str, bytes]]] = ()
    retried: bool = True

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `httpx.Client.request`."""
        fields = {name: _text(name, v) for name, v in self.options.items() if v is not None}
        sent = {"data": fields, "files": list(self.files)} if self.files else {"params": fields}
        return {"method": self.method, "url": self.path, **sent}

    def wait(self, response: httpx.Response, attempt: int, retries: int) -> float | None:
        """Return the seconds to wait before a retry, or None if there should be none.

        The wait is at least `Retry-After`; without one it doubles with each attempt. A service
        that asks for more than half a minute is not retried.

        Args:
            response: The answer of a service that may be busy.
            attempt: Number of retries so far.
            retries: Limit on the number of retries.
        """
        if response.status_code not in _BUSY or attempt >= retries or not self.retried:
            return None
        wait = _retry_after(response.headers.get("Retry-After", ""))
        if wait is None:
            wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
        if wait > _LONGEST_WAIT:
            return None
        return wait * (1 + _JITTER * random.random())  # noqa: S311  not a secret

    def result(self, response: httpx.Response) -> T:
        """Read an answer.

        Raises:
            ServiceError: The answer is an error, or not of a service of this kind.
        """
        request_id = response.headers.get("X-Request-ID")
        if not response.is_success:
            raise ServiceError(response.status_code, _detail(response), request_id)
        try:
            return self.read({**response.json(), "request_id": request_id})
        except (KeyError, TypeError, ValueError) as error:
            detail = f"{response.url} answered something else than this client reads: {error!r}"
            raise ServiceError(response.status_code, detail, request_id) from error


def detect(images: Any, options: Mapping[str, Any]) -> Call[Any]:
    """Describe a detection in one image, or in a list or tuple of them.

    Raises:
        ValueError: The list is empty.
    """
    if not isinstance(images, list | tuple):
        read = partial(answers.read_image, answers.Result)
        return Call("POST", "v1/detect", read, options, [("file", _file(images))])
    if not images:
        raise ValueError("images is an empty list")
    files = [("files", _file(image)) for image in images]
    return Call("POST", "v1/detect", answers.read_results, options, files)


def checked(results: Any, *, return_errors: bool) -> Any:
    """Return the results of a detection.

    Raises:
        ServiceError: An image of a list could not be read, and `return_errors` is false.
    """
    if isinstance(results, list) and not return_errors:
        for result in results:
            if isinstance(result, ServiceError):
                raise result
    return results


def preview(image: Any, options: Mapping[str, Any]) -> Call[answers.Preview]:
    """Describe a preview of thresholds."""
    files = [("file", _file(image))]
    return Call("POST", "v1/thresholds/preview", answers.read_preview, options, files)


MODELS = Call(
    "GET", "v1/models", lambda body: [answers.build(answers.Model, one) for one in body["models"]]
)
READY = Call("GET", "health/ready", lambda body: bool(body["status"]), retried=False)


def model(name: str, version: str | None) -> Call[answers.ModelCard]:
    """Describe the request for one model's card."""
    path = f"v1/models/{quote(name, safe='')}"
    return Call("GET", path, partial(answers.build, answers.ModelCard), {"version": version})


def http_options(url: str, token: str | None, timeout: float | None) -> dict[str, Any]:
    """Return the arguments of `httpx.Client` for a service.

    Raises:
        ValueError: The address is not an HTTP URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must start with http:// or https://, got {url!r}")
    headers = {"User-Agent": f"ghm-triton/{installed('ghm-triton')}"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        return {"base_url": httpx.URL(url), "headers": headers, "timeout": timeout}
    except httpx.InvalidURL as error:
        raise ValueError(f"url is {url!r}: {error}") from error


def unanswered(error: httpx.TransportError, timeout: float | None) -> ServiceError:
    """Return the error for a request without an answer."""
    where = error.request.url
    if isinstance(error, httpx.TimeoutException):
        return ServiceError(None, f"{where} did not answer within {timeout:g} s")
    return ServiceError(None, f"{where} does not answer: {error}")


def not_ready(error: ServiceError) -> bool:
    """Return False for the errors of a service that is not ready.

    Raises:
        ServiceError: The error is another one.
    """
    if error.status in (None, 503):
        return False
    raise error


def _retry_after(text: str) -> float | None:
    """Parse seconds or an HTTP date."""
    if text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def _detail(response: httpx.Response) -> str:
    """Return the detail of a problem, or the status phrase if a proxy answered."""
    try:
        return str(response.json()["detail"])
    except (KeyError, TypeError, ValueError):
        return response.reason_phrase or "an error without a description"


def _text(name: str, value: Any) -> str:
    if name == "thresholds":
        return json.dumps(dict(value))
    if name == "steps":
        return json.dumps(list(value))
    if name != "classes" or isinstance(value, str):
        return str(value)
    names = list(value)
    with_comma = [one for one in names if "," in one]
    if with_comma and len(names) > 1:
        raise ValueError(f"class {with_comma[0]!r} has a comma in its name: ask for it alone")
    return ",".join(names)


def _file(image: Any) -> tuple[str, bytes]:
    """Return a name and the bytes of an image file.

    Raises:
        TypeError: The image is not a path, bytes or a Pillow image.
        ValueError: The Pillow image has a mode that is not sent.
        OSError: The file cannot be read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        return "image", bytes(image)
    if isinstance(image, str | PathLike):
        path = Path(fspath(image))
        return path.name, path.read_bytes()
    if callable(getattr(image, "save", None)) and hasattr(image, "mode"):
        return _encode(image)
    raise TypeError(f"an image must be a path, bytes or a Pillow image, got {type(image).__name__}")


def _encode(image: PIL.Image.Image) -> tuple[str, bytes]:
    """Encode the pixels as they are in memory, without EXIF's orientation."""
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=1)
        return "image.png", buffer.getvalue()
    if image.mode == "CMYK":
        image.save(buffer, "TIFF")
        return "image.tiff", buffer.getvalue()
    raise ValueError(f"a Pillow image of mode {image.mode} is not sent: convert it to RGB first")
