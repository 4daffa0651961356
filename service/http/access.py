"""One access line, and one observation of latency, for every request."""

from __future__ import annotations

import logging
from time import perf_counter
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.observability import logs

logger = logging.getLogger("ghm.access")

# What an access line says where the client went away before there was an answer, as nginx does.
CLIENT_GONE = 499

# The route of whatever is no route of the API. The path itself would let anybody make up labels.
OTHER = "other"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# The health checks of every load balancer, several a second: worth a line to who debugs only.
_QUIET = ("/health/", "/v2/health/", "/metrics")


class RequestObserver(Protocol):
    """Whoever counts requests: the metrics."""

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has been answered."""


class AccessMiddleware:
    """Measures each request, logs one line about it, and tells the metrics.

    The line has `method`, `path` (without its query), `route`, `status`, `ms`, `bytes_in`,
    `bytes_out`, `client`, and what `service.observability.logs.note` was told on the way: `model`,
    `images`, `detections`, and `token`, the name of the token that was used. Answered checks of
    health and scrapes are logged at `debug`.

    Args:
        app: What answers.
        observer: Told of each request by its route's template.
    """

    def __init__(self, app: ASGIApp, observer: RequestObserver) -> None:
        self.app = app
        self.observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        seen = _Seen(perf_counter(), logs.begin_request(scope["state"]["request_id"]))
        path = scope["path"]

        async def counted_receive() -> Message:
            message = await receive()
            seen.bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            else:
                seen.bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, counted_receive, counted_send)
        except ClientDisconnect:
            raise
        except Exception:
            seen.status = seen.status or 500  # what RequestIdMiddleware makes of it
            raise
        finally:
            self._tell(scope, path, seen)

    def _tell(self, scope: Scope, path: str, seen: _Seen) -> None:
        seconds = perf_counter() - seen.started
        status = seen.status or CLIENT_GONE
        method = scope["method"] if scope["method"] in _METHODS else OTHER
        route = getattr(scope.get("route"), "path", OTHER)
        self.observer.request(route, method, status, seconds)
        level = logging.DEBUG if path.startswith(_QUIET) and status < 400 else logging.INFO
        if logger.isEnabledFor(level):
            facts = {
                **seen.notes,
                "method": method,
                "path": path[:200],
                "route": route,
                "status": status,
                "ms": round(seconds * 1000, 3),
                "bytes_in": seen.bytes_in,
                "bytes_out": seen.bytes_out,
                "client": client_address(scope),
            }
            # As `logger.log` does, but for looking through the stack for who calls.
            record = logging.LogRecord(logger.name, level, "", 0, "request", None, None)
            record.facts = facts
            logger.handle(record)


class _Seen:
    """What went by while a request was answered."""

    __slots__ = ("bytes_in", "bytes_out", "notes", "started", "status")

    def __init__(self, started: float, notes: dict[str, Any]) -> None:
        self.started = started
        self.notes = notes
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0


def client_address(scope: Scope) -> str:
    """Where a request comes from, without the port; `unknown` for a socket without addresses."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"
