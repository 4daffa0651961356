"""Bodies of requests and answers, compressed or not.

A body is inflated as it arrives and never beyond the limit, so that a few kilobytes that claim to
be gigabytes cost no more than an honest body does.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from fastapi import Request

from service.core.errors import ProblemError, short
from service.http.reception import hold

# zlib's own format, and gzip's around the same stream.
_WINDOW = {"deflate": zlib.MAX_WBITS, "gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16}
_ACCEPTED = {"Accept-Encoding": "gzip, deflate"}

_SLICE = 2**20  # inflated at a time
_CHUNK = 2**16  # compressed bytes looked at at a time

# Nothing but a bomb shrinks so well: letterboxed photographs do by 2 to 50 times. Small bodies may,
# so that black test images do.
_FREE_BYTES = 8 * 2**20
_LARGEST_RATIO = 256

_WORTH_COMPRESSING = 1024
_FAST = 1  # zlib's level: an answer should not wait for its last percent

OffLoop = Callable[..., Awaitable[object]]


async def read_body(request: Request, max_bytes: int, off_loop: OffLoop) -> bytes:
    """Read a request's body and undo its `Content-Encoding`.

    Args:
        request: The request; its body is plain, `gzip` or `deflate`.
        max_bytes: The most bytes, both as sent and inflated.
        off_loop: Runs a blocking function elsewhere and awaits it.

    Returns:
        The body, inflated.

    Raises:
        ProblemError: 400 for a body that is not what its `Content-Encoding` says, 413 for one that
            is too large, 415 for a coding that is not read here.
    """
    coding = _coding(request)
    promised = request.headers.get("content-length", "")
    if promised.isdecimal() and int(promised) > max_bytes:
        raise _too_large(max_bytes)
    inflater = None if coding is None else Inflater(coding, max_bytes)
    body, read = bytearray(), 0
    async with aclosing(request.stream()) as chunks:
        async for chunk in chunks:
            read += len(chunk)
            if read > max_bytes:
                raise _too_large(max_bytes)
            if inflater is None:
                body += chunk
            elif chunk:
                await off_loop(inflater.feed, chunk)
                hold(request, inflater.grown())
    return bytes(body) if inflater is None else inflater.finish()


def _coding(request: Request) -> str | None:
    given = ",".join(request.headers.getlist("content-encoding"))
    codings = [name for part in given.split(",") if (name := part.strip().lower()) != ""]
    applied = [name for name in codings if name != "identity"]
    if not applied:
        return None
    if len(applied) > 1 or applied[0] not in _WINDOW:
        raise ProblemError(
            415, f"Content-Encoding is {short(given)}; send gzip, deflate, or neither", _ACCEPTED
        )
    return applied[0]


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(413, f"the body is larger than the {max_bytes} bytes that are read here")


class Inflater:
    """Undoes one compression, piece by piece, and no further than a limit.

    Args:
        coding: `gzip`, `x-gzip` or `deflate`.
        max_bytes: The most bytes that may come out.
    """

    def __init__(self, coding: str, max_bytes: int) -> None:
        self._coding = coding
        self._max_bytes = max_bytes
        self._stream = zlib.decompressobj(_WINDOW[coding])
        self._body = bytearray()
        self._read = 0
        self._told = 0

    def feed(self, compressed: bytes) -> None:
        """Take the next bytes.

        Raises:
            ProblemError: 400 where they are not of this coding or go on behind its end, 413 where
                too much comes out, at all or for so few bytes.
        """
        for start in range(0, len(compressed), _CHUNK):
            self._inflate(compressed[start : start + _CHUNK])

    def grown(self) -> int:
        """How many bytes have come out since this was last asked."""
        before, self._told = self._told, len(self._body)
        return self._told - before

    def _inflate(self, rest: bytes) -> None:
        while rest:
            if self._stream.eof:
                raise self._wrong("bytes follow the end of its one stream")
            try:
                piece = self._stream.decompress(rest, _SLICE)
            except zlib.error as error:
                raise self._wrong(str(error)) from error
            unread = self._stream.unconsumed_tail
            self._read += len(rest) - len(unread)
            self._body += piece
            self._check_size()
            rest = unread or self._stream.unused_data

    def _check_size(self) -> None:
        size = len(self._body)
        if size > self._max_bytes:
            raise _too_large(self._max_bytes)
        if size > _FREE_BYTES and size > _LARGEST_RATIO * self._read:
            raise ProblemError(
                413,
                f"the body inflates more than {_LARGEST_RATIO}-fold; beyond {_FREE_BYTES} bytes,"
                " send such a body uncompressed",
            )

    def finish(self) -> bytes:
        """The whole body.

        Raises:
            ProblemError: 400 where the stream has not ended.
        """
        if not self._stream.eof:
            raise self._wrong("it ends too early")
        return bytes(self._body)

    def _wrong(self, why: str) -> ProblemError:
        return ProblemError(400, f"Content-Encoding is {self._coding}, but the body is not: {why}")


def compress(body: bytes, accepted: str) -> tuple[bytes, str | None]:
    """Compress an answer, if its client takes that and it is long enough to gain.

    Args:
        body: The answer.
        accepted: The request's `Accept-Encoding`.

    Returns:
        The bytes to send, and their `Content-Encoding`; None where they are as they were.
    """
    if len(body) < _WORTH_COMPRESSING:
        return body, None
    weights = dict(_weight(part) for part in accepted.split(","))
    if weights.get("gzip", weights.get("*", 0.0)) > 0:
        return gzip.compress(body, _FAST, mtime=0), "gzip"
    if weights.get("deflate", 0.0) > 0:
        return zlib.compress(body, _FAST), "deflate"
    return body, None


def _weight(part: str) -> tuple[str, float]:
    """A coding and how much it is wanted; 0 is not at all."""
    name, *options = (piece.strip().lower() for piece in part.split(";"))
    for option in options:
        if option.startswith("q="):
            try:
                return name, float(option[2:])
            except ValueError:
                return name, 0.0
    return name, 1.0
