"""Traces, for whoever has an OpenTelemetry collector.

On where `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) is set; needs the
extra `otel`. One span a request, the child of the caller's where it sent a `traceparent`, and one
a stage. OpenTelemetry's own variables (`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`,
`OTEL_EXPORTER_OTLP_HEADERS` and so on) hold. Where it is off, nothing of it is imported.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.settings import SettingsError
from service.observability import logs

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"

# What makes the spans of the request that this code runs for; None where traces are off.
_tracer: ContextVar[Tracer | None] = ContextVar("ghm_tracer", default=None)


def wanted() -> str | None:
    """The name of the variable that asks for traces; None where none does."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    return next((name for name in ENDPOINTS if os.environ.get(name)), None)


def start(exporter: SpanExporter | None = None) -> TracerProvider | None:
    """Make what traces go through.

    Args:
        exporter: Takes the spans; sends them to the endpoint of the environment where None.

    Returns:
        None where the environment asks for no traces. `shutdown()` of it sends what is left.

    Raises:
        SettingsError: Traces are asked for and the extra is missing, or a protocol is asked for
            that it does not speak.
    """
    variable = wanted()
    if variable is None:
        return None
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: only {_PROTOCOL} is spoken here"
        )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{variable} is set, but traces need the package {error.name!r}:"
            " pip install 'ghm-triton[otel]'"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "ghm")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return provider


class TracingMiddleware:
    """A span for each request.

    Args:
        app: What answers.
        provider: As `start` returns it.
    """

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.app = app
        self._tracer = provider.get_tracer("ghm.service")
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind, StatusCode

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        path = scope["path"]
        with self._tracer.start_as_current_span(
            scope["method"],
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": path,
                "ghm.request_id": scope["state"]["request_id"],
            },
        ) as span:
            _tracer.set(self._tracer)
            logs.note(trace_id=f"{span.get_span_context().trace_id:032x}")

            async def watched_send(message: Message) -> None:
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                await send(message)

            try:
                await self.app(scope, receive, watched_send)
            finally:
                route = getattr(scope.get("route"), "path", None)
                if route is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attribute("http.route", route)


def stage(name: str, seconds: float) -> None:
    """Add a span for a stage of the current request that has just ended.

    Args:
        name: The stage's.
        seconds: How long it took.
    """
    tracer = _tracer.get()
    if tracer is None:
        return
    end = time.time_ns()
    tracer.start_span(name, start_time=end - round(seconds * 1e9)).end(end)
