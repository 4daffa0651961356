"""Checks of a request's head: its size, and what would be ambiguous for a proxy in front."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from httptools import HttpRequestParser

from service.core.errors import short

_MOST_HEADERS = 100  # as Envoy


class Refusal(Exception):  # noqa: N818  raised through the parser, which wraps it
    """What is no request.

    Args:
        status: Of the answer.
        reason: For the counter of refusals.
        detail: For the client and the log.
    """

    def __init__(self, status: HTTPStatus, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason


def check_head(
    parser: HttpRequestParser,
    url: bytes,
    headers: Sequence[tuple[bytes, bytes]],
    data: bytes,
    limit: int,
) -> None:
    """Check a head that has been parsed.

    Args:
        parser: What parsed it.
        url: The request's target.
        headers: Names in lower case, and values.
        data: What the parser works on.
        limit: Bytes of the URL and the headers.

    Raises:
        Refusal: The head is too large or ambiguous, or is no HTTP/1.1 or HTTP/1.0.
    """
    size, hosts, codings = len(url), 0, []
    for name, value in headers:
        size += len(name) + len(value) + 4
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            codings.append(value)
    if size > limit or len(headers) > _MOST_HEADERS:
        raise too_large(limit, headers=len(url) <= limit)
    version = parser.get_http_version()
    if version not in ("1.1", "1.0"):
        raise _unsupported(f"HTTP/{version}")
    # The parser takes these for HTTP. In a head that comes in pieces they are not found.
    target = data.find(url + b" ")
    if target >= 0 and data.startswith((b"RTSP/", b"ICE/"), target + len(url) + 1):
        raise _unsupported("RTSP or ICE")
    if parser.get_method() == b"CONNECT":
        raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "malformed", "CONNECT is not answered")
    if hosts > 1 or (not hosts and version == "1.1"):
        detail = f"the request has {hosts} Host headers; it must have one"
        raise Refusal(HTTPStatus.BAD_REQUEST, "malformed", detail)
    if codings and (version == "1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
        detail = f"Transfer-Encoding is {short(b', '.join(codings))}; only chunked is supported"
        raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "malformed", detail)


def too_large(limit: int, *, headers: bool) -> Refusal:
    """Return the refusal of a head whose headers, or whose URL alone, are beyond the limit."""
    if headers:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        detail = f"the headers are more than {limit} bytes, or more than {_MOST_HEADERS}"
    else:
        status = HTTPStatus.REQUEST_URI_TOO_LONG
        detail = f"the URL is longer than {limit} bytes"
    return Refusal(status, "headers_too_large", detail)


def _unsupported(protocol: str) -> Refusal:
    status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
    return Refusal(status, "malformed", f"{protocol} is not supported; use HTTP/1.1")
