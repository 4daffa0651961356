"""The middleware that every request passes, as one ordered list.

`build_middleware` is the list; the middleware of each concern is beside it: access log and last
resort here, tokens in `auth`, rates in `rate_limit`, and bounds on bodies in `bodies`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from http import HTTPStatus
from time import monotonic, perf_counter
from typing import Any
from uuid import uuid4

from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.core.errors import problem_response
from service.core.settings import Settings, SettingsError
from service.http.auth import AuthMiddleware, TokenStore
from service.http.bodies import BodyLimitMiddleware
from service.http.rate_limit import RateLimitMiddleware
from service.observability import logs, traces
from service.observability.metrics import Metrics

logger = logging.getLogger("ghm.service")
access_logger = logging.getLogger("ghm.access")

REQUEST_ID = "X-Request-ID"

# An id that a client chose goes into the log and into the answer, so only these are accepted.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_ORIGIN = re.compile(r"https?://[^/?#\s]+", re.IGNORECASE)

# The status logged when the client disconnects before the answer starts, as in nginx.
CLIENT_GONE = 499

# The route label of requests that match no route of the API: paths would be unbounded labels.
OTHER = "other"

# Refusals answered at once, and per second beyond these.
REFUSALS = 100
REFUSALS_PER_SECOND = 100.0
LONGEST_PAUSE = 1.0

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Polled by load balancers several times a second: logged at DEBUG when they succeed.
_QUIET = ("/health/", "/v2/health/", "/metrics")


def build_middleware(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Return the middleware that the settings ask for, outermost first.

    Raises:
        SettingsError: A token or an origin is malformed.
    """
    store = TokenStore(settings)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=parse_origins(settings.cors_origins),
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(REQUEST_ID, "Retry-After", "Inference-Header-Content-Length"),
    )
    proxies = Middleware(ProxyMiddleware, trusted_hosts=settings.trusted_proxies)
    auth = Middleware(AuthMiddleware, store=store, settings=settings, metrics=metrics)
    rate_limit = Middleware(RateLimitMiddleware, settings=settings, metrics=metrics)
    return [
        # Before everything that logs, counts or limits by address.
        *([proxies] if settings.trusted_proxies else []),
        # The id comes early, so that every answer and every log line has one.
        Middleware(
            CorrelationIdMiddleware,
            header_name=REQUEST_ID,
            validator=None,
            transformer=_accepted_request_id,
        ),
        Middleware(AccessMiddleware, metrics=metrics),
        # Outside of everything that refuses or fails, so that pages can read those answers too.
        *([cors] if settings.cors_origins else []),
        Middleware(PaceMiddleware),
        Middleware(ErrorMiddleware),
        # Refusals come before a body is read.
        *([auth] if store.required else []),
        *([rate_limit] if settings.rate_limit else []),
        Middleware(
            BodyLimitMiddleware,
            max_bytes=settings.max_received_bytes,
            seconds=settings.receive_seconds,
            metrics=metrics,
        ),
    ]


def _accepted_request_id(value: str) -> str:
    return value if _REQUEST_ID.fullmatch(value) else uuid4().hex


def parse_origins(text: str) -> list[str]:
    """Split a comma-separated list of origins: `*`, or `https://host[:port]` each.

    Raises:
        SettingsError: An origin has a path or no scheme, so that no browser would send it.
    """
    origins = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"cors_origins: {origin!r} is no origin; write it as https://example.com, without"
                " a path or a slash at the end"
            )
    return origins


class ProxyMiddleware(ProxyHeadersMiddleware):
    """Takes the client's address and scheme from the headers of trusted proxies."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one connection."""
        if scope["type"] == "http" and not scope.get("client"):
            scope["client"] = ("unix", 0)
        await super().__call__(scope, receive, send)


class PaceMiddleware:
    """Answers 429 at a bounded rate, so that clients which retry at once cannot take the processor.

    A refusal beyond the rate waits for its turn, at most `LONGEST_PAUSE` seconds. Its body is not
    read meanwhile.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = monotonic) -> None:
        self.app = app
        self._clock = clock
        self._turn = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""

        async def paced_send(message: Message) -> None:
            if message.get("status") == HTTPStatus.TOO_MANY_REQUESTS:
                now = self._clock()
                self._turn = max(self._turn, now - REFUSALS / REFUSALS_PER_SECOND)
                self._turn = min(self._turn + 1 / REFUSALS_PER_SECOND, now + LONGEST_PAUSE)
                if self._turn > now:
                    await asyncio.sleep(self._turn - now)
            await send(message)

        await self.app(scope, receive, paced_send)


class ErrorMiddleware:
    """Turns unexpected exceptions into a 500 without their details, which go to the log.

    A lack of memory is a 503: the same request may succeed later.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ClientDisconnect:
            logger.info("request %s: the client went away", correlation_id.get())
        except MemoryError:
            logger.error("request %s: not enough memory", correlation_id.get())
            if started:
                raise
            detail = "there is not enough memory at the moment"
            await problem_response(503, detail, {"Retry-After": "1"})(scope, receive, send)
        except Exception:
            request = correlation_id.get(), scope["method"], scope["path"]
            logger.exception("request %s: %s %s failed", *request)
            if started:  # half an answer is out: only cutting the connection is left
                raise
            detail = "the service failed; its log has the reason beside the request_id"
            await problem_response(500, detail)(scope, receive, send)


class AccessMiddleware:
    """Logs one line and observes the latency of each request.

    The line has `method`, `path` (without the query), `route`, `status`, `ms`, `bytes_in`,
    `bytes_out`, `client`, and what `service.observability.logs.note` added: `model`, `images`,
    `detections`, and `token`, the name of the token that was used. Latencies are observed by the
    template of the route.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = scope.setdefault("state", {})["request_id"] = correlation_id.get() or ""
        notes = logs.begin_request(request_id)
        traces.identify(request_id)
        path, started = scope["path"], perf_counter()
        # HEAD is answered as GET; the server leaves the body out.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        status = bytes_in = bytes_out = 0

        async def counted_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def counted_send(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                bytes_out += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(inner, counted_receive, counted_send)
        finally:
            seconds = perf_counter() - started
            request = {
                "method": scope["method"] if scope["method"] in _METHODS else OTHER,
                "path": path[:200],
                "route": getattr(inner.get("route"), "path_format", OTHER),
                "status": status or CLIENT_GONE,
                "ms": round(seconds * 1000, 3),
                "bytes_in": bytes_in,
                "bytes_out": bytes_out,
                "client": (scope.get("client") or ["unknown"])[0],
            }
            self.metrics.request(request["route"], request["method"], request["status"], seconds)
            _log({**notes, **request})


def _log(facts: dict[str, Any]) -> None:
    quiet = facts["path"].startswith(_QUIET) and facts["status"] < 400
    level = logging.DEBUG if quiet else logging.INFO
    if access_logger.isEnabledFor(level):
        # As `Logger.log`, without searching the stack for the caller.
        record = logging.LogRecord(access_logger.name, level, "", 0, "request", None, None)
        record.facts = facts
        access_logger.handle(record)
