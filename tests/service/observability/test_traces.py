"""Traces as a collector gets them: over HTTP, in protobuf, from a service in a real process."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from fastapi import FastAPI
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.observability import traces

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def spans(detector, model, monkeypatch):
    """A traced client, and the spans that have ended."""
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")  # nobody listens, and nothing is sent
    exporter = InMemorySpanExporter()
    app = create_app(Settings(model=detector, threads=1, provider="cpu"), model)
    provider = app.state.tracing
    provider._active_span_processor._span_processors = (SimpleSpanProcessor(exporter),)
    with TestClient(app) as client:
        yield client, exporter.get_finished_spans


def test_a_span_a_request_and_one_a_stage(spans, png):
    client, finished = spans
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    response = client.post("/v1/detect?threshold=0.5", content=png, headers=headers)
    *stages, request = finished()
    assert request.name == "POST /v1/detect"
    assert request.kind.name == "SERVER"
    assert f"{request.parent.span_id:016x}" == PARENT
    expected = {
        "http.request.method": "POST",
        "url.path": "/v1/detect",
        "url.query": "",  # options of a request are not recorded
        "http.route": "/v1/detect",
        "http.response.status_code": 200,
        "ghm.request_id": response.headers["x-request-id"],
    }
    assert dict(request.attributes) | expected == dict(request.attributes)
    assert "threshold" not in str(dict(request.attributes))
    assert {one.name for one in stages} == {"read", "decode", "queue", "inference", "encode"}
    for one in stages:
        assert f"{one.context.trace_id:032x}" == TRACE
        assert one.parent.span_id == request.context.span_id
        assert request.start_time <= one.start_time < one.end_time <= request.end_time


def test_without_a_caller_a_trace_begins_here(spans, caplog):
    client, finished = spans
    caplog.set_level("INFO", logger="ghm.access")
    client.get("/v1/models")
    client.get("/v1/models", headers={"traceparent": "nonsense"})
    one, other = finished()
    assert one.parent is other.parent is None
    assert one.context.trace_id != other.context.trace_id
    logged = [record.facts["trace_id"] for record in caplog.records if record.name == "ghm.access"]
    assert logged == [f"{span.context.trace_id:032x}" for span in (one, other)]


def test_an_unsampled_callers_requests_leave_no_spans(spans, png):
    client, finished = spans
    client.post("/v1/detect", content=png, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert finished() == ()


def test_errors_of_ours_are_errors_of_the_span_and_unknown_paths_name_none(spans, monkeypatch):
    client, finished = spans
    client.get("/made/up")
    client.app.state.service.draining = True
    client.get("/health/ready")
    unknown, unready = finished()
    assert unknown.name == "GET"
    assert unknown.status.status_code.name == "UNSET"
    assert unready.status.status_code.name == "ERROR"


def test_the_end_of_the_service_is_the_end_of_its_traces(detector, model, monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    exporter = InMemorySpanExporter()
    app = create_app(Settings(model=detector, threads=1, provider="cpu"), model)
    app.state.tracing.add_span_processor(SimpleSpanProcessor(exporter))
    with TestClient(app):
        assert not exporter._stopped
    assert exporter._stopped


def test_off_unless_asked_for(monkeypatch):
    assert traces.instrument(FastAPI()) is None
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traces.instrument(FastAPI()) is None
    traces.stage("decode", 1.0)  # outside of a request: nothing


def test_a_protocol_that_is_not_spoken(monkeypatch):
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        traces.instrument(FastAPI())


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[3],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_is_imported_where_it_is_off():
    code = """
import sys, service.app
from service.core.settings import Settings
service.app.create_app(Settings(model="x.onnx"))
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = python(code)
    # FastAPI looks for the API by itself where it is installed; the SDK is ours to import.
    assert "opentelemetry.sdk" not in done.stdout
    assert "opentelemetry.exporter" not in done.stdout
    assert done.returncode == 0, done.stderr


def test_asked_for_without_the_extra_is_an_error_that_says_so():
    code = """
import sys
sys.modules["opentelemetry.exporter.otlp.proto.http.trace_exporter"] = None
from service.observability import traces
from fastapi import FastAPI
traces.instrument(FastAPI())
"""
    done = python(code, **{ENDPOINT: "http://127.0.0.1:9"})
    assert "SettingsError: OTEL_EXPORTER_OTLP_ENDPOINT is set" in done.stderr
    assert "pip install 'ghm-triton[otel]'" in done.stderr


@pytest.fixture
def collector():
    """Something that listens as a collector does; its address, and the spans that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", got
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_stop_sends_what_is_left_to_the_collector(collector, detector):
    url, got = collector
    code = f"""
import json
from starlette.testclient import TestClient
from service.app import create_app
from service.core.settings import Settings
with TestClient(create_app(Settings(model={str(detector)!r}, threads=1, provider="cpu"))) as client:
    print(json.dumps(client.get("/health/live").json()))
"""
    done = python(code, **{ENDPOINT: url, "OTEL_SERVICE_NAME": "cells"})
    assert json.loads(done.stdout) == {"status": "alive"}, done.stderr
    ((path, request),) = got
    assert path == "/v1/traces"
    (resource,) = request.resource_spans
    names = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert names["service.name"] == "cells"
    assert [one.name for one in resource.scope_spans[0].spans] == ["GET /health/live"]
