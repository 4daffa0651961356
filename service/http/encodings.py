"""Compression: bodies inflated up to a limit, and answers compressed as clients accept it."""

from __future__ import annotations

import gzip
import zlib

from service.core.errors import ProblemError

# zlib's own format, and gzip's around the same stream.
WINDOWS = {"deflate": zlib.MAX_WBITS, "gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16}

_SLICE = 2**20  # bytes inflated at a time
_CHUNK = 2**16  # compressed bytes inflated at a time

# Letterboxed photographs shrink 2 to 50 times: beyond this ratio a body is a bomb. Bodies up to
# `_FREE_BYTES` may have any ratio, so that black test images are accepted.
_FREE_BYTES = 8 * 2**20
_LARGEST_RATIO = 256

_WORTH_COMPRESSING = 1024
_FAST = 1  # zlib's level: latency matters more than the last percent


def too_large(max_bytes: int) -> ProblemError:
    """Return the error of a body beyond its limit."""
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
        self._stream = zlib.decompressobj(WINDOWS[coding])
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
            raise too_large(self._max_bytes)
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
    if accepts_gzip(accepted):
        return gzip.compress(body, _FAST, mtime=0), "gzip"
    if parse_weights(accepted).get("deflate", 0.0) > 0:
        return zlib.compress(body, _FAST), "deflate"
    return body, None


def accepts_gzip(accepted: str) -> bool:
    """Whether an `Accept-Encoding` header accepts gzip."""
    weights = parse_weights(accepted)
    return weights.get("gzip", weights.get("*", 0.0)) > 0


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
