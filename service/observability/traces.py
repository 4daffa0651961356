"""OpenTelemetry traces: a span per request, and one per stage.

Enabled if `OTEL_EXPORTER_OTLP_ENDPOINT` (or `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`) is set; needs the
extra `otel`. OpenTelemetry's other variables (`OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`,
`OTEL_EXPORTER_OTLP_HEADERS` and so on) apply. If disabled, its SDK is not imported.
"""

from __future__ import annotations

import os
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from ghm_triton.extras import how_to_install
from service.core.settings import SettingsError
from service.observability import logs

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"

# Tracer and span of the current request; None if traces are disabled.
_current: ContextVar[tuple[Tracer, Span] | None] = ContextVar("ghm_trace", default=None)


def instrument(app: FastAPI, exporter: SpanExporter | None = None) -> TracerProvider | None:
    """Trace the requests of an application, if the environment asks for it.

    Args:
        app: The application.
        exporter: Receives the spans; None sends them to the endpoint of the environment.

    Returns:
        The provider, whose `shutdown()` sends the remaining spans; None if traces are disabled.

    Raises:
        SettingsError: Traces are enabled and the extra is missing, or the protocol is not
            supported.
    """
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    variable = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
    if disabled or variable is None:
        return None
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), _PROTOCOL)
    if protocol != _PROTOCOL:
        raise SettingsError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}: only {_PROTOCOL} is supported"
        )
    # The stable names of attributes, such as http.route. Read when the instrumentation is imported.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{variable} is set, but traces need the package {error.name!r}:"
            f" {how_to_install('otel')}"
        ) from error
    name = os.environ.get("OTEL_SERVICE_NAME", "ghm")
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    tracer = provider.get_tracer("ghm.service")

    def begin(span: Span, scope: dict[str, Any]) -> None:  # noqa: ARG001  OpenTelemetry's
        span.set_attribute("url.query", "")  # options of a request are not recorded
        _current.set((tracer, span))

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        server_request_hook=begin,
        exclude_spans=["receive", "send"],
    )
    return provider


def identify(request_id: str) -> None:
    """Record the id of the current request in its span, and the span's trace in its log line."""
    current = _current.get()
    if current is not None:
        _, span = current
        span.set_attribute("ghm.request_id", request_id)
        logs.note(trace_id=f"{span.get_span_context().trace_id:032x}")


def stage(name: str, seconds: float) -> None:
    """Add a span for a stage of the current request that has just ended.

    Args:
        name: Name of the stage.
        seconds: Its duration.
    """
    current = _current.get()
    if current is None:
        return
    tracer, _ = current
    end = time.time_ns()
    tracer.start_span(name, start_time=end - round(seconds * 1e9)).end(end)
