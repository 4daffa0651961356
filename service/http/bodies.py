"""Request bodies within bounds of bytes and time, and compression of answers.

A queue bounds the images that are worked on; `BodyLimitMiddleware` bounds the bodies that are
still arriving. Without it, a thousand clients that each hold back the last byte of a body would
make the service hold a thousand bodies. A compressed body is inflated as it arrives and never
beyond the limit, so a small body that claims to be gigabytes costs no more than an honest one.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import ProblemError, short
from service.observability.metrics import Metrics

_HELD = "held_bytes"

# zlib's own format, and gzip's around the same stream.
_WINDOW = {"deflate": zlib.MAX_WBITS, "gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16}
_ACCEPTED = {"Accept-Encoding": "gzip, deflate"}

_SLICE = 2**20  # bytes inflated at a time
_CHUNK = 2**16  # compressed bytes inflated at a time

# Letterboxed photographs shrink 2 to 50 times: beyond this ratio a body is a bomb. Bodies up to
# `_FREE_BYTES` may have any ratio, so that black test images are accepted.
_FREE_BYTES = 8 * 2**20
_LARGEST_RATIO = 256

_WORTH_COMPRESSING = 1024
_FAST = 1  # zlib's level: latency matters more than the last percent

OffLoop = Callable[..., Awaitable[object]]


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
        held = scope.setdefault("state", {})[_HELD] = _Held(self)
        end = asyncio.get_running_loop().time() + self.seconds
        arrived = False

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
            held.add(len(message.get("body", b"")))
            return message

        try:
            await self.app(scope, receive_in_time, send)
        finally:
            self.held -= held.amount


class _Held:
    """The bytes that one request holds."""

    def __init__(self, limit: BodyLimitMiddleware) -> None:
        self._limit = limit
        self.amount = 0

    def add(self, amount: int) -> None:
        """Hold more bytes.

        Raises:
            ProblemError: 429 if all requests together hold too much. A request that is alone is
                never refused.
        """
        limit = self._limit
        if self.amount < limit.held and limit.held + amount > limit.max_bytes:
            limit.metrics.rejected("bodies")
            raise ProblemError(
                429,
                f"busy: {limit.held} bytes of bodies are held, and at most {limit.max_bytes} may"
                " be",
                {"Retry-After": "1"},
            )
        self.amount += amount
        limit.held += amount


async def read_body(request: Request, max_bytes: int, off_loop: OffLoop) -> bytes:
    """Read a request's body and undo its `Content-Encoding`.

    Args:
        request: The request; its body is plain, `gzip` or `deflate`.
        max_bytes: Limit on the body, both as sent and inflated.
        off_loop: Runs a blocking function in a thread.

    Returns:
        The inflated body.

    Raises:
        ProblemError: 400 if the body is not what its `Content-Encoding` states, 413 if it is too
            large, 415 if the coding is not supported, 429 if all requests hold too much.
    """
    coding = _coding(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    inflater = None if coding is None else Inflater(coding, max_bytes)
    held = request.scope.get("state", {}).get(_HELD)
    body, inflated, size = bytearray(), 0, 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            if inflater is None:
                body += chunk
            elif chunk:
                await off_loop(inflater.feed, chunk)
                if held is not None:
                    held.add(inflater.size - inflated)
                inflated = inflater.size
    return bytes(body) if inflater is None else inflater.finish()


def _coding(request: Request) -> str | None:
    value = ",".join(request.headers.getlist("content-encoding"))
    codings = [part.strip().lower() for part in value.split(",")]
    applied = [coding for coding in codings if coding not in ("", "identity")]
    if not applied:
        return None
    if len(applied) > 1 or applied[0] not in _WINDOW:
        raise ProblemError(
            415, f"Content-Encoding is {short(value)}; send gzip, deflate, or neither", _ACCEPTED
        )
    return applied[0]


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(413, f"the body is larger than the {max_bytes} bytes that are read here")


class Inflater:
    """Incremental decompression up to a limit.

    Args:
        coding: `gzip`, `x-gzip` or `deflate`.
        max_bytes: Limit on the inflated bytes.
    """

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._coding = coding
        self._max_bytes = max_bytes
        self._stream = zlib.decompressobj(_WINDOW[coding])
        self._body = bytearray()
        self._read = 0

    @property
    def size(self) -> int:
        """Bytes inflated so far."""
        return len(self._body)

    def feed(self, compressed: bytes) -> None:
        """Inflate the next bytes.

        Raises:
            ProblemError: 400 if they are not of this coding or follow its end, 413 if the body
                inflates too far, in total or for its size.
        """
        for start in range(0, len(compressed), _CHUNK):
            rest = compressed[start : start + _CHUNK]
            while rest:
                if self._stream.eof:
                    raise self._malformed("bytes follow the end of its one stream")
                try:
                    self._body += self._stream.decompress(rest, _SLICE)
                except zlib.error as error:
                    raise self._malformed(str(error)) from error
                unread = self._stream.unconsumed_tail
                self._read += len(rest) - len(unread)
                self._check_size()
                rest = unread or self._stream.unused_data

    def _check_size(self) -> None:
        if self.size > self._max_bytes:
            raise _too_large(self._max_bytes)
        if self.size > _FREE_BYTES and self.size > _LARGEST_RATIO * self._read:
            raise ProblemError(
                413,
                f"the body inflates more than {_LARGEST_RATIO}-fold; beyond {_FREE_BYTES} bytes,"
                " send such a body uncompressed",
            )

    def finish(self) -> bytes:
        """Return the whole body.

        Raises:
            ProblemError: 400 if the stream has not ended.
        """
        if not self._stream.eof:
            raise self._malformed("it ends too early")
        return bytes(self._body)

    def _malformed(self, reason: str) -> ProblemError:
        return ProblemError(
            400, f"Content-Encoding is {self._coding}, but the body is not: {reason}"
        )


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Compress an answer if the client accepts it and the answer is long enough to gain.

    Args:
        body: The answer.
        accepted: The request's `Accept-Encoding`.

    Returns:
        The bytes to send, and their `Content-Encoding`, None if they are unchanged.
    """
    if len(body) < _WORTH_COMPRESSING:
        return body, None
    weights = parse_weights(accepted)
    if weights.get("gzip", weights.get("*", 0.0)) > 0:
        return gzip.compress(body, _FAST, mtime=0), "gzip"
    if weights.get("deflate", 0.0) > 0:
        return zlib.compress(body, _FAST), "deflate"
    return body, None


def parse_weights(header: str) -> dict[str, float]:
    """Parse an `Accept` or `Accept-Encoding` header into names and quality values.

    A malformed quality counts as 0.
    """
    weights = {}
    for part in header.split(","):
        name, *options = (piece.strip().lower() for piece in part.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weights[name] = float(quality)
        except ValueError:
            weights[name] = 0.0
    return weights
