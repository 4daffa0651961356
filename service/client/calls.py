"""What a client sends, and what it makes of the answer. Nothing here waits or touches a network."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
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
_SPREAD = 0.25  # of a wait, added at random, so that clients refused together do not return so

# Modes of Pillow that PNG holds as they are; CMYK goes as TIFF.
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request, and what its answer is read with.

    Attributes:
        method: Of HTTP.
        path: Below the service's address.
        read: Makes an answer of the body's JSON, to which `request_id` is added.
        fields: Of the form, or of the query where there are no files.
        files: Names of form fields, each with a file's name and bytes.
        retried: Whether to ask again when the service is busy.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    fields: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[tuple[str, tuple[str, bytes]]] = ()
    retried: bool = True

    def request(self) -> dict[str, Any]:
        """The arguments of `httpx.Client.request`."""
        place = "data" if self.files else "params"
        sent = {"files": list(self.files)} if self.files else {}
        return {"method": self.method, "url": self.path, place: dict(self.fields), **sent}


class ModelOptions(TypedDict, total=False):
    """Which model answers: `model` by name and `version`, where several are served."""

    model: str | None
    version: str | None


class DetectOptions(ModelOptions, total=False):
    """What `detect` takes besides images.

    Attributes:
        threshold: The score in [0, 1] that a detection of any class must reach, in place of the
            file's thresholds.
        thresholds: The same by class.
        classes: Only these.
        iou: The overlap in [0, 1] that NMS allows between boxes of a class.
        max_detections: At most so many an image, the best.
    """

    threshold: float | None
    thresholds: Mapping[str, float] | None
    classes: str | Iterable[str] | None
    iou: float | None
    max_detections: int | None


class PreviewOptions(ModelOptions, total=False):
    """What `preview` takes besides an image.

    Attributes:
        floor: The least score of interest, in [0, 1].
        steps: Thresholds to count at.
        classes: Only these.
        iou: The overlap in [0, 1] that NMS allows between boxes of a class.
    """

    floor: float | None
    steps: Iterable[float] | None
    classes: str | Iterable[str] | None
    iou: float | None


def detect_one(image: Any, options: Mapping[str, Any]) -> Call[answers.Result]:
    """Find objects in an image."""
    files = [("file", _file(image))]
    return Call("POST", "v1/detect", answers.read_result, _fields(options), files)


def detect_many(
    images: Sequence[Any], options: Mapping[str, Any]
) -> Call[list[answers.Result | ServiceError]]:
    """Find objects in several images.

    Raises:
        ValueError: There is none.
    """
    if not images:
        raise ValueError("images is an empty list")
    files = [("files", _file(image)) for image in images]
    return Call("POST", "v1/detect", answers.read_results, _fields(options), files)


def all_read(results: Sequence[answers.Result | ServiceError]) -> list[answers.Result]:
    """The results, where every image could be read.

    Raises:
        ServiceError: The first that could not.
    """
    read = []
    for one in results:
        if isinstance(one, ServiceError):
            raise one
        read.append(one)
    return read


def preview(image: Any, options: Mapping[str, Any]) -> Call[answers.Preview]:
    """Every box from a floor on."""
    files = [("file", _file(image))]
    return Call("POST", "v1/thresholds/preview", answers.read_preview, _fields(options), files)


def models() -> Call[list[answers.Model]]:
    """What is served."""
    return Call("GET", "v1/models", answers.read_models)


def model(name: str, version: str | None) -> Call[answers.ModelCard]:
    """One model's card."""
    path = f"v1/models/{quote(name, safe='')}"
    return Call("GET", path, answers.read_card, _fields({"version": version}))


def ready() -> Call[bool]:
    """Whether the service answers requests. Asked once: the answer is no, not later."""
    return Call("GET", "health/ready", answers.read_ready, retried=False)


def http_options(url: str, token: str | None, timeout: float | None) -> dict[str, Any]:
    """The arguments of `httpx.Client` for a service.

    Raises:
        ValueError: The address is not one of HTTP.
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


def wait_before_retry(response: httpx.Response, attempt: int, retries: int) -> float | None:
    """How long to wait before asking a busy service again.

    Args:
        response: Its answer.
        attempt: How often it has been asked again already.
        retries: How often it may be.

    Returns:
        Seconds: at least what `Retry-After` says, twice as long each time where it says nothing;
        None where asking again is of no use, or `Retry-After` is more than half a minute.
    """
    if response.status_code not in _BUSY or attempt >= retries:
        return None
    asked = _retry_after(response.headers.get("Retry-After", ""))
    if asked is not None and asked > _LONGEST_WAIT:
        return None
    wait = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT) if asked is None else asked
    return wait * (1 + _SPREAD * random.random())  # noqa: S311  nobody gains by guessing it


def _retry_after(text: str) -> float | None:
    """Seconds, from a number or a date of HTTP."""
    if text.isdecimal():
        return float(text)
    try:
        moment = parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


def read(call: Call[T], response: httpx.Response) -> T:
    """What an answer says.

    Raises:
        ServiceError: It is an error, or not one that a service of this kind gives.
    """
    request_id = response.headers.get("X-Request-ID")
    if not response.is_success:
        raise ServiceError(response.status_code, _detail(response), request_id)
    try:
        return call.read({**response.json(), "request_id": request_id})
    except (KeyError, TypeError, ValueError) as error:
        detail = f"{response.url} answered with something else than this client reads: {error!r}"
        raise ServiceError(response.status_code, detail, request_id) from error


def unanswered(error: httpx.TransportError, timeout: float | None) -> ServiceError:
    """What a request without an answer is for its caller."""
    where = error.request.url
    if isinstance(error, httpx.TimeoutException):
        return ServiceError(None, f"{where} did not answer within {timeout:g} s")
    return ServiceError(None, f"{where} does not answer: {error}")


def _detail(response: httpx.Response) -> str:
    """What problem+json says; the status alone where a proxy answered in its own words."""
    try:
        return str(response.json()["detail"])
    except (KeyError, TypeError, ValueError):
        return response.reason_phrase or "an error without a word about it"


def _fields(options: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(name, value) for name, value in options.items() if value is not None}


def _text(name: str, value: Any) -> str:
    if name == "thresholds":
        return json.dumps(dict(value))
    if name == "steps":
        return json.dumps(list(value))
    if name == "classes":
        return _joined(value)
    return str(value)


def _joined(classes: str | Iterable[str]) -> str:
    names = [classes] if isinstance(classes, str) else list(classes)
    apart = [name for name in names if "," in name]
    if apart and len(names) > 1:
        raise ValueError(f"class {apart[0]!r} has a comma in its name: ask for it alone")
    return ",".join(names)


def _file(image: Any) -> tuple[str, bytes]:
    """A name and the bytes of an image file.

    Raises:
        TypeError: It is none of the kinds that a client takes.
        ValueError: It is a Pillow image of a mode that no file format here holds.
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
    """The pixels as they are in memory: EXIF's orientation is not sent along."""
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=1)
        return "image.png", buffer.getvalue()
    if image.mode == "CMYK":
        image.save(buffer, "TIFF")
        return "image.tiff", buffer.getvalue()
    raise ValueError(f"a Pillow image of mode {image.mode} is not sent: convert it to RGB first")
