"""What every request passes on its way in, from its id to the bounds of its body."""

from __future__ import annotations

import re

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service.core.settings import Settings, SettingsError
from service.http.access import AccessMiddleware
from service.http.auth import AuthMiddleware, TokenStore
from service.http.rate_limit import RateLimitMiddleware
from service.http.reception import ReceptionMiddleware
from service.http.request_id import HEADER, RequestIdMiddleware
from service.observability import traces as telemetry
from service.observability.metrics import Metrics

_ORIGIN = re.compile(r"https?://[^/?#\s]+", re.IGNORECASE)


def install(app: FastAPI, settings: Settings, metrics: Metrics) -> None:
    """Add what the settings ask for.

    Args:
        app: The application; its `state.tracing` ends the traces when it stops.
        settings: Who may ask, how often, and from where.
        metrics: Told of each request and refusal.

    Raises:
        SettingsError: A token or an origin cannot be, or traces are asked for without their extra.
    """
    # Starlette puts each around those before it.
    app.add_middleware(
        ReceptionMiddleware,
        max_bytes=settings.max_received_bytes,
        seconds=settings.receive_seconds,
        observer=metrics,
    )
    if settings.rate_limit:
        app.add_middleware(RateLimitMiddleware, settings=settings, observer=metrics)
    store = TokenStore(settings)
    if store.required:
        app.add_middleware(AuthMiddleware, store=store, settings=settings, observer=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=parse_origins(settings.cors_origins),
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=(HEADER, "Retry-After", "Inference-Header-Content-Length"),
        )
    app.state.tracing = telemetry.start()
    if app.state.tracing is not None:
        app.add_middleware(telemetry.TracingMiddleware, provider=app.state.tracing)
    app.add_middleware(AccessMiddleware, observer=metrics)
    app.add_middleware(RequestIdMiddleware)


def parse_origins(text: str) -> list[str]:
    """The origins of a list with commas: `*`, or `https://host` each, with a port or not.

    Raises:
        SettingsError: One has a path or no scheme: no browser would ever send it so.
    """
    origins = [origin.strip() for origin in text.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"cors_origins: {origin!r} is no origin; write it as https://example.com, without"
                " a path or a slash at the end"
            )
    return origins
