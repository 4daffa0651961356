"""Request bodies within bounds of bytes and time, and compression of answers.

A queue bounds the images that are worked on; `BodyLimitMiddleware` bounds the bodies that are
still arriving. Without it, a thousand clients that each hold back the last byte of a body would
make the service hold a thousand bodies. A compressed body is inflated as it arrives and never
beyond the limit, so a small body that claims to be gigabytes costs no more than an honest one.
"""

from __future__ import annotations

import asyncio
import binascii
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import unquote_to_bytes

import orjson
from fastapi import Request
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import ProblemError, short
from service.http.encodings import WINDOWS, Inflater, too_large
from service.observability.metrics import Metrics

_HOLD = "hold_bytes"

_ACCEPTED = {"Accept-Encoding": "gzip, deflate"}

_JSON = "application/json"
_FORM = "multipart/form-data"
_MOST_VALUES = 20_000
_MOST_FIELDS = 32
_MOST_FIELD_BYTES = 64 * 1024  # of an option; files are bounded by the body
_PARSED_AT_ONCE = 64 * 1024  # larger bodies are parsed in a thread, beside other requests

T = TypeVar("T")


class OffLoop(Protocol):
    """Runs a blocking function in a thread."""

    def __call__(self, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Run it, and wait for its result."""


class BodyLimitMiddleware:
    """Bounds the bytes of all bodies together, and the time that each may take to arrive.

    Args:
        app: The application.
        max_bytes: Bytes of all bodies held at a time.
        seconds: Seconds from a request's headers to the end of its body.
        metrics: Counts refusals.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float, metrics: Metrics) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.metrics = metrics
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        end = asyncio.get_running_loop().time() + self.seconds
        arrived, request_bytes = False, 0

        def hold(amount: int) -> None:
            """Hold more bytes; a request that is alone is never refused."""
            nonlocal request_bytes
            if request_bytes < self.held and self.held + amount > self.max_bytes:
                self.metrics.rejected("bodies")
                raise ProblemError(
                    429,
                    f"busy: {self.held} bytes of bodies are held, and at most {self.max_bytes} may"
                    " be",
                    {"Retry-After": "1"},
                )
            request_bytes += amount
            self.held += amount

        async def receive_in_time() -> Message:
            nonlocal arrived
            if arrived:  # only the disconnect can follow
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                self.metrics.rejected("slow_body")
                raise ProblemError(
                    408, f"the body did not arrive within {self.seconds:g} s"
                ) from None
            arrived = not message.get("more_body", False)
            hold(len(message.get("body", b"")))
            return message

        scope.setdefault("state", {})[_HOLD] = hold
        try:
            await self.app(scope, receive_in_time, send)
        finally:
            self.held -= request_bytes


async def read_body(request: Request, max_bytes: int, off_loop: OffLoop) -> bytes:
    """Read a request's body and undo its `Content-Encoding`.

    Args:
        request: The request; its body is plain, `gzip` or `deflate`.
        max_bytes: Limit on the body, both as sent and inflated.
        off_loop: Runs a blocking function in a thread.

    Raises:
        ProblemError: 400 if the body is not what its `Content-Encoding` states, 413 if it is too
            large, 415 if the coding is not supported, 429 if all requests hold too much.
    """
    coding = _coding(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large(max_bytes)
    inflater = None if coding is None else Inflater(coding, max_bytes)
    hold = request.scope.get("state", {}).get(_HOLD)
    body, inflated, size = bytearray(), 0, 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise too_large(max_bytes)
            if inflater is None:
                body += chunk
            elif chunk:
                await off_loop(inflater.feed, chunk)
                if hold is not None:
                    hold(inflater.size - inflated)
                inflated = inflater.size
    return bytes(body) if inflater is None else inflater.finish()


def _coding(request: Request) -> str | None:
    value = ",".join(request.headers.getlist("content-encoding"))
    codings = [part.strip().lower() for part in value.split(",")]
    applied = [coding for coding in codings if coding not in ("", "identity")]
    if not applied:
        return None
    if len(applied) > 1 or applied[0] not in WINDOWS:
        raise ProblemError(
            415, f"Content-Encoding is {short(value)}; send gzip, deflate, or neither", _ACCEPTED
        )
    return applied[0]


@dataclass(frozen=True)
class Upload:
    """The images and options of a request.

    Attributes:
        images: For each image its bytes and a name for error messages.
        fields: Names and values of the options in order: text from a form, any value from JSON.
        many: Whether the client sent a list, as `files` or `images`.
    """

    images: list[tuple[str, bytes]]
    fields: list[tuple[str, Any]]
    many: bool = False


async def read_upload(
    request: Request, max_bytes: int, max_images: int, off_loop: OffLoop
) -> Upload:
    """Read the images and options in a request's body.

    Args:
        request: Its body is one image; or `multipart/form-data` with one `file` or several
            `files`; or JSON with base64 in `image`, or a list of it in `images`.
        max_bytes: Limit on the body, both as sent and inflated.
        max_images: Limit on the number of images.
        off_loop: Runs a blocking function in a thread.

    Raises:
        ProblemError: 400 if the body is malformed or has no image, 413 if it is too large, 415 if
            its `Content-Type` or `Content-Encoding` is not supported.
    """
    content_type = request.headers.get("content-type", "")
    kind = content_type.partition(";")[0].strip().lower()
    is_image = kind in ("", "application/octet-stream") or kind.startswith("image/")
    if not is_image and kind not in (_FORM, _JSON):
        raise ProblemError(
            415,
            f"Content-Type is {short(kind)}; send one image as image/* or"
            f" application/octet-stream, files as {_FORM}, or base64 as {_JSON}",
        )
    body = await read_body(request, max_bytes, off_loop)
    if is_image:
        return Upload([("the body", body)], [])

    def parse() -> Upload:
        is_form = kind == _FORM
        return read_form(content_type, body, max_images) if is_form else read_json(body, max_images)

    return parse() if len(body) <= _PARSED_AT_ONCE else await off_loop(parse)


class _FormParser(MultiPartParser):
    """Starlette's parser, in memory alone, which refuses forms that are cut short.

    RFC 7578 forbids `filename*`, but some clients send it instead of `filename`.
    """

    spool_max_size = sys.maxsize  # the body is in memory already: no temporary files
    ended = False

    def on_headers_finished(self) -> None:
        """Read the name and the file name of a part."""
        part = self._current_part
        extended = _EXTENDED_FILENAME.search(part.content_disposition or b"")
        if extended and part.content_disposition:
            name = unquote_to_bytes(extended[1]).replace(b'"', b"'")
            part.content_disposition += b'; filename="' + name + b'"'
        super().on_headers_finished()

    def on_end(self) -> None:
        """Note the closing boundary."""
        self.ended = True


_EXTENDED_FILENAME = re.compile(
    rb"""^(?!.*filename=).*filename\*\s*=\s*[\w-]*'[\w-]*'([^;\s]*)""", re.IGNORECASE | re.DOTALL
)


def read_form(content_type: str, body: bytes, max_images: int) -> Upload:
    """Read the images and options of a `multipart/form-data` body, at most `max_images` files.

    Raises:
        ProblemError: 400 if the form is malformed, cut short, or has too many parts.
    """

    async def chunks() -> AsyncGenerator[bytes]:
        yield body

    parser = _FormParser(
        Headers({"Content-Type": content_type}),
        chunks(),
        max_files=max_images,
        max_fields=_MOST_FIELDS,
        max_part_size=_MOST_FIELD_BYTES,
    )
    try:
        form = _run(parser.parse())
    except MultiPartException as error:
        raise ProblemError(400, f"the form is malformed: {error.message}") from error
    if not parser.ended:
        raise ProblemError(400, "the form is malformed: it ends too early")
    items = form.multi_items()
    fields = [(name, value) for name, value in items if isinstance(value, str)]
    files = [(name, value) for name, value in items if isinstance(value, UploadFile)]
    many = _is_many([name for name, _ in files], [name for name, _ in fields])
    images = []
    for index, (_, file) in enumerate(files):
        prefix = f"files[{index}]" if many else "file"
        images.append((f"{prefix} {short(file.filename)}", file.file.read()))
    return Upload(images, fields, many)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never waits: the form is in memory."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return cast(T, done.value)
    raise RuntimeError("a form in memory was waited for")


def _is_many(files: list[str], fields: list[str]) -> bool:
    """Whether a form's files are `files` (any number) rather than one `file`."""
    if files and all(name == "files" for name in files):
        return True
    if files == ["file"]:
        return False
    if not files:
        textual = bool({"file", "files"} & set(fields))
        hint = "; a part without a filename is text, not a file" if textual else ""
        raise ProblemError(
            400, f"the form holds no file{hint}: send one `file`, or several `files`"
        )
    raise ProblemError(
        400, f"the form's files are named {short(files)}: send one `file`, or only `files`"
    )


def read_json(body: bytes, max_images: int) -> Upload:
    """Read the images and options of a JSON body.

    Raises:
        ProblemError: 400 if the body is not such an object.
    """
    # Base64 has none of these characters. A megabyte of them alone would parse to fifty.
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > _MOST_VALUES:
        raise ProblemError(400, f"the body is JSON of more than {_MOST_VALUES} values")
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ProblemError(400, f"the body is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ProblemError(400, "the body must be a JSON object with `image` or `images`")
    image, images = content.pop("image", None), content.pop("images", None)
    fields = [(name, value) for name, value in content.items() if value is not None]
    if (image is None) == (images is None):
        raise ProblemError(400, "the body must have either `image` or `images`")
    if image is not None:
        return Upload([("image", _from_base64("image", image))], fields)
    if not isinstance(images, list) or not images:
        raise ProblemError(400, "`images` must be a list of base64, and not empty")
    if len(images) > max_images:
        raise ProblemError(400, f"`images` holds {len(images)} images; at most {max_images} do")
    named = [(f"images[{index}]", text) for index, text in enumerate(images)]
    return Upload([(name, _from_base64(name, text)) for name, text in named], fields, many=True)


def _from_base64(name: str, text: object) -> bytes:
    if not isinstance(text, str):
        raise ProblemError(400, f"{name} is {short(text)}, and not base64")
    if text.startswith("data:"):  # as browsers write it
        text = text.partition(",")[2]
    encoded = text.encode().translate(None, b"\r\n\t ")  # tools break long lines
    try:
        return binascii.a2b_base64(encoded, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise ProblemError(400, f"{name} is not base64: {error}") from error
