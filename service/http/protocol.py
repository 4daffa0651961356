"""HTTP/1.1 connections with bounds on what is not yet a request, and on answers that wait.

uvicorn's httptools protocol parses and answers; bounds on bodies are in `bodies`. Added here:

- One request, one answer: an `Upgrade` is ignored, ambiguous framing and hosts are refused.
- Bytes of a URL, of headers and of trailers, and the time until a head is complete, are bounded;
  so are pipelined requests, connections, and the time in which an answer makes no progress.
- A refusal is answered in order, after the answers of earlier requests, and the connection is
  closed only after the client has had time to read it.
- A client that ends its side of the connection gets its answer.
"""

from __future__ import annotations

import itertools
import logging
from asyncio import AbstractEventLoop, Transport
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from socket import SO_ERROR, SOL_SOCKET
from typing import Any, TypeGuard, cast

import httptools
from starlette.responses import Response
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.utils import is_ssl
from uvicorn.server import ServerState

from service.core.errors import problem_response
from service.http.heads import Refusal, check_head, too_large

logger = logging.getLogger("ghm.service")

_MOST_PIPELINED = 16
_MOST_REFUSED = 8  # connections beyond the limit whose clients may read their refusal
_LINGER_SECONDS = 2.0
_WATCH_SECONDS = 0.1
_SLOWEST_READER = 1024  # bytes per second
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_USES = itertools.count()  # orders connections by use; the loop's time is too coarse


@dataclass(frozen=True)
class ConnectionLimits:
    """Bounds on the connections of a process.

    Attributes:
        header_bytes: Bytes of a URL and headers, and of trailers.
        header_seconds: Seconds from a connection, or the first byte of a further request, to the
            end of its headers.
        write_seconds: Seconds in which a client must read a kilobyte of an answer each.
        unsent_bytes: Bytes of answers that wait for their readers. Beyond them the longest is
            dropped.
        connections: Open connections; beyond them, the one that is idle longest is closed.
    """

    header_bytes: int = 64 * 1024
    header_seconds: float = 10.0
    write_seconds: float = 30.0
    unsent_bytes: int = 256 * 2**20
    connections: int = 1000


class BoundedProtocol(HttpToolsProtocol):
    """One connection.

    Args:
        config: uvicorn's configuration.
        server_state: State that connections share.
        app_state: State of the application's lifespan.
        _loop: The event loop.
        limits: The bounds.
        count: Called with the reason of each refusal.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        limits: ConnectionLimits,
        count: Callable[[str], None],
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._count = count
        self._held = 0  # bytes that the parser took and has not passed on
        self._fed = b""  # what the parser works on
        self._in_body = False
        self._closing = False  # further data is discarded
        self._running: RequestResponseCycle | None = None
        self.last_used = next(_USES)
        self._head_since: float | None = self.loop.time()
        self.unsent = 0  # bytes of answers that the client has not read, at the last check
        self._window = self.loop.time(), 0

    @property
    def _idle(self) -> bool:
        return not self.pipeline and (self._running is None or self._running.response_complete)

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Accept a connection; beyond the limit, close an idle one or refuse this."""
        super().connection_made(transport)
        if len(self.connections) <= self._limits.connections:
            return
        idle = [other for other in self.connections if other is not self and _is_idle(other)]
        if idle:
            self._count("connections")
            longest = min(idle, key=lambda other: other.last_used)
            longest.transport.abort()
            self.connections.discard(longest)
        else:
            detail = f"busy: {self._limits.connections} connections are open, which is the most"
            self._refuse(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "connections", detail))
            if len(self.connections) > self._limits.connections + _MOST_REFUSED:
                self.transport.abort()  # each that lingers has a descriptor

    def check(self, now: float) -> None:
        """Close a connection whose head is late, or whose client reads nothing of its answer.

        Args:
            now: The loop's time.
        """
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent > self.unsent:  # nothing waits, or a further answer does
            self._window = now, unsent
        self.unsent = unsent
        since, before = self._window
        if now - since > self._limits.write_seconds:
            if before - unsent < _SLOWEST_READER * (now - since):
                self.drop_answer()
                return
            self._window = now, unsent
        late = self._head_since is not None and now - self._head_since > self._limits.header_seconds
        if not late or self._closing or not self._idle:
            return
        if self._held:
            detail = f"the headers did not arrive within {self._limits.header_seconds:g} s"
            self._refuse(Refusal(HTTPStatus.REQUEST_TIMEOUT, "slow_headers", detail))
        else:
            self.transport.close()

    def drop_answer(self) -> None:
        """Close the connection of a client that does not read its answer."""
        self._count("slow_reader")
        self.unsent = 0
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse what a client sent, unless the connection is closing."""
        if self._closing:
            return
        if self._head_since is None and self._idle:
            self._head_since = self.loop.time()
            self.last_used = next(_USES)
        self._unset_keepalive_if_required()
        try:
            while data:
                self._held += len(data)
                data = self._feed(data)
            if self._held > self._limits.header_bytes:
                in_url = not self._in_body and not self.headers
                raise too_large(self._limits.header_bytes, headers=not in_url)
        except Refusal as refusal:
            self._refuse(refusal)
        except httptools.HttpParserError as error:
            cause = error.__context__
            detail = f"the request is not HTTP/1.1: {str(error) or type(error).__name__}"
            malformed = Refusal(HTTPStatus.BAD_REQUEST, "malformed", detail)
            self._refuse(cause if isinstance(cause, Refusal) else malformed)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that has ended its side alone; return whether to keep the connection.

        A client that is gone looks the same until it is sent something: a reset follows then.
        """
        if self._closing or self._in_body or self._idle or is_ssl(self.transport):
            return False
        self._closing = True
        running = cast(RequestResponseCycle, self._running)
        last = self.pipeline[0][0] if self.pipeline else running
        last.keep_alive = False
        if not running.response_started and running.scope["http_version"] == "1.1":
            self.transport.write(_CONTINUE)
            self._watch_for_reset()
        return True

    def _watch_for_reset(self) -> None:
        if self._idle or self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(SOL_SOCKET, SO_ERROR):
            self.transport.abort()
        else:
            self.loop.call_later(_WATCH_SECONDS, self._watch_for_reset)

    def _feed(self, data: bytes) -> bytes:
        """Parse data; return what to parse instead of the rest of it."""
        self._fed = data
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            # The parser takes an offer of another protocol as accepted. The request is parsed again
            # without the offer, which a server may ignore (RFC 9110, section 7.8).
            version = self.parser.get_http_version().encode()
            head = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            head += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return b"\r\n".join([*head, b"", data[upgrade.args[0] :]])
        finally:
            self._fed = b""
        return b""

    def on_message_begin(self) -> None:
        """Begin a request."""
        if len(self.pipeline) >= _MOST_PIPELINED:
            detail = f"more than {_MOST_PIPELINED} requests wait on this connection"
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, "pipelined", detail)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Check a head, and start or queue its request."""
        check_head(self.parser, self.url, self.headers, self._fed, self._limits.header_bytes)
        if self.parser.should_upgrade():
            return  # `_feed` parses it again
        self._head_since = None
        self._held = 0
        self._in_body = True
        super().on_headers_complete()
        self.headers = []  # takes the trailers, which are discarded

    def on_chunk_header(self) -> None:
        """Pass a chunk's size."""
        self._held = 0

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._held = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request."""
        if not self.parser.should_upgrade():
            self._held = 0
            self._in_body = False
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let no request of a lost connection answer; uvicorn marks the one that came last."""
        super().connection_lost(exc)
        waiting = [cycle for cycle, _ in self.pipeline]
        self.pipeline.clear()
        for cycle in (self._running, *waiting):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle

        async def answer(scope: Any, receive: Any, send: Any) -> None:
            async def send_message(message: Any) -> None:
                if cycle.more_body and message["type"] == "http.response.start":
                    self._close_after(cycle)  # rather than wait for the rest of the body
                await send(message)

            await app(scope, receive, send_message if cycle.more_body else send)

        super()._start_asgi_task(cycle, answer)

    def _close_after(self, cycle: RequestResponseCycle) -> None:
        cycle.keep_alive = False
        cycle.transport = cast(Transport, _LingeringTransport(self.transport, self._linger))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is not a request, after the answers of earlier requests, and close."""
        self._closing = True
        self._count(refusal.reason)
        client = self.client[0] if self.client else "a local socket"
        logger.warning("%s: refused with %d: %s", client, refusal.status, refusal)
        running = None if self._idle else self._running
        if self._in_body and self.pipeline:
            self.pipeline.popleft()  # the request whose body is malformed
        elif self._in_body and running is not None:
            running.disconnected = True
            running.message_event.set()
            if running.response_started:
                self.transport.close()
                return
            running = None
        last = self.pipeline[0][0] if self.pipeline else running
        if last is None:
            self._write(problem_response(refusal.status, str(refusal)))
            self._linger()
        else:
            self._close_after(last)

    def _write(self, response: Response) -> None:
        headers = [*self.server_state.default_headers, *response.raw_headers]
        lines = [b"%s: %s\r\n" % header for header in headers if header[0] != b"connection"]
        head = [STATUS_LINE[response.status_code], *lines, b"connection: close\r\n\r\n"]
        self.transport.write(b"".join([*head, response.body]))

    def _linger(self) -> None:
        """Close once the client has closed, or a moment later.

        Closing while data of the client is unread would reset the connection, and the client might
        lose the answer.
        """
        self._closing = True
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.transport.close)


class _LingeringTransport:
    """What a request's answer needs of a transport, with another way to close it."""

    def __init__(self, transport: Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


def check_connections(connections: Iterable[object], now: float, limits: ConnectionLimits) -> None:
    """Check each connection, and that all answers that wait together are within their bound.

    Args:
        connections: Those of a server.
        now: The loop's time. To be called about once a second.
        limits: The bounds.
    """
    bounded = [one for one in tuple(connections) if isinstance(one, BoundedProtocol)]
    for connection in bounded:
        connection.check(now)
    waiting = sorted((one for one in bounded if one.unsent), key=lambda one: one.unsent)
    total = sum(one.unsent for one in waiting)
    while len(waiting) > 1 and total > limits.unsent_bytes:
        longest = waiting.pop()
        total -= longest.unsent
        longest.drop_answer()


def _is_idle(connection: object) -> TypeGuard[BoundedProtocol]:
    return isinstance(connection, BoundedProtocol) and connection._idle
