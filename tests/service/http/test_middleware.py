"""Request ids, errors, access lines and CORS, on a service and on applications of our own."""

import asyncio
import logging
import re
from contextlib import suppress
from types import SimpleNamespace

import pytest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from service.core.settings import Settings, SettingsError
from service.engine.session import ModelError
from service.http.auth import AuthMiddleware
from service.http.bodies import BodyLimitMiddleware
from service.http.middleware import (
    AccessMiddleware,
    ErrorMiddleware,
    PaceMiddleware,
    build_middleware,
    parse_origins,
)
from service.http.rate_limit import RateLimitMiddleware
from service.observability.metrics import Metrics

PAGE = "https://example.com"
SECRET = "s3cret-token-of-ours"  # noqa: S105  made up


@pytest.fixture
def failing(model, monkeypatch):
    """Makes the model fail."""

    def fail(*inputs, **options):
        raise ModelError("the secret insides")

    monkeypatch.setattr(model, "run", fail)


@pytest.fixture
def lines(caplog):
    """The facts of the access lines so far."""
    caplog.set_level(logging.DEBUG, logger="ghm.access")
    return lambda: [one.facts for one in caplog.records if one.name == "ghm.access"]


def test_the_order(detector):
    every = {"tokens": "a", "rate_limit": 1, "cors_origins": PAGE}
    few, many = (
        [one.cls for one in build_middleware(Settings(model=detector, **changes), Metrics())]
        for changes in ({}, every)
    )
    inner = [PaceMiddleware, ErrorMiddleware, AuthMiddleware, RateLimitMiddleware]
    assert many[1:] == [AccessMiddleware, CORSMiddleware, *inner, BodyLimitMiddleware]
    assert few == [many[0], AccessMiddleware, *inner[:2], BodyLimitMiddleware]


# Request ids.


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        (None, False),
        ("trace-1.a_B", True),
        ("a b", False),
        ("x" * 65, False),
        ("a\tb", False),
        ("é".encode("latin-1"), False),
    ],
)
def test_every_answer_has_one_id_the_clients_own_if_it_is_harmless(client, problem, header, kept):
    headers = {} if header is None else {"X-Request-ID": header}
    answers = [client.get("/nowhere", headers=headers) for _ in range(2)]
    for answer in answers:
        problem(answer, 404)  # compares the header with the body
        request_id = answer.headers["x-request-id"]
        assert request_id == header if kept else re.fullmatch("[0-9a-f]{32}", request_id)
    assert kept or answers[0].headers["x-request-id"] != answers[1].headers["x-request-id"]


# Unexpected errors.


def test_a_500_without_details_counted_logged_and_readable_by_pages(
    serve_with, failing, png, problem, caplog, lines
):
    with serve_with(cors_origins=PAGE) as client:
        response = client.post("/v1/detect", content=png, headers={"Origin": PAGE})
        counted = client.get("/metrics").text
    assert "request_id" in problem(response, 500)
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert response.headers["access-control-allow-origin"] == PAGE
    assert response.headers["x-request-id"] in caplog.text
    assert "the secret insides" in caplog.text
    assert lines()[0]["status"] == 500
    assert 'route="/v1/detect",status="500"} 1.0' in counted


def test_a_lack_of_memory_is_a_503(client, png, problem, monkeypatch):
    def fail(*inputs):
        raise MemoryError

    monkeypatch.setattr("service.api.pipeline.decode_file", fail)
    response = client.post("/v1/detect", content=png)
    assert "not enough memory" in problem(response, 503)
    assert response.headers["retry-after"] == "1"


# The access log.


def test_a_line_for_a_detection(client, png, lines):
    response = client.post("/v1/detect?threshold=0.5", content=png)
    (line,) = lines()
    assert line.pop("ms") > 0
    assert line == {
        "request_id": response.headers["x-request-id"],
        "model": "colours",
        "images": 1,
        "detections": len(response.json()["detections"]),
        "method": "POST",
        "path": "/v1/detect",
        "route": "/v1/detect",
        "status": 200,
        "bytes_in": len(png),
        "bytes_out": len(response.content),
        "client": "testclient",
    }


@pytest.mark.parametrize(
    ("path", "route", "status"),
    [
        ("/v1/models/colours", "/v1/models/{name}", 200),
        ("/v1/models/nobody", "/v1/models/{name}", 404),
        ("/v1/detect", "/v1/detect", 405),
        ("/made/up/by/anybody", "other", 404),
        ("/openapi.json", "other", 200),
    ],
)
def test_routes_are_templates(client, lines, path, route, status):
    client.get(path)
    (line,) = lines()
    assert (line["path"], line["route"], line["status"]) == (path, route, status)


def test_successful_polls_are_logged_at_debug(client, caplog):
    caplog.set_level(logging.DEBUG, logger="ghm.access")
    for path in ("/health/live", "/metrics", "/v1/models", "/health/nothing"):
        client.get(path)
    levels = [one.levelname for one in caplog.records if one.name == "ghm.access"]
    assert levels == ["DEBUG", "DEBUG", "INFO", "INFO"]


def test_neither_tokens_nor_images_get_into_the_log(serve_with, png, caplog):
    caplog.set_level(logging.DEBUG)
    with serve_with(tokens=f"me:{SECRET}") as client:
        headers = {"Authorization": f"Bearer {SECRET}", "Cookie": f"a={SECRET}"}
        client.post(f"/v1/detect?key={SECRET}", content=png, headers=headers)
        client.get("/v1/models", headers={"Authorization": f"Bearer {SECRET}x"})
    records = [one for one in caplog.records if one.name.startswith("ghm")]
    assert [one.facts["status"] for one in records if one.name == "ghm.access"] == [422, 401]
    text = repr([(one.getMessage(), vars(one)) for one in records])
    assert SECRET not in text
    assert "PNG" not in text
    assert "'token': 'me'" in text


def observe(app, messages=(), **changes) -> list[tuple]:
    """The route, method and status that are counted for an application of our own."""
    seen = []
    metrics = SimpleNamespace(request=lambda *labels: seen.append(labels[:3]))
    waiting = list(messages)

    async def receive():
        return waiting.pop(0)

    async def send(message):
        pass

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": [], **changes}
    middleware = AccessMiddleware(ErrorMiddleware(app), metrics)
    with suppress(ZeroDivisionError, asyncio.CancelledError):
        asyncio.run(middleware(scope, receive, send))
    return seen


START = {"type": "http.response.start", "status": 200, "headers": []}


async def half(scope, receive, send):
    await send(START)
    raise ZeroDivisionError


async def gone(scope, receive, send):
    raise ClientDisconnect


async def dropped(scope, receive, send):
    raise asyncio.CancelledError


async def echo(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send(START)
    await send({"type": "http.response.body", "body": b"12", "more_body": True})
    await send({"type": "http.response.body", "body": b"345"})


@pytest.mark.parametrize(("app", "status"), [(gone, 499), (dropped, 499), (half, 200)])
def test_a_request_that_ends_early(lines, app, status):
    assert observe(app) == [("other", "GET", status)]
    assert [line["status"] for line in lines()] == [status]


def test_labels_and_lines_are_bounded(lines):
    parts = [{"type": "http.request", "body": b"x" * n, "more_body": n != 3} for n in (10, 3)]
    seen = observe(echo, parts, method="MAKEUP", path="/" + "x" * 5000, client=None)
    assert seen == [("other", "other", 200)]
    (line,) = lines()
    assert (line["bytes_in"], line["bytes_out"]) == (13, 5)
    assert (len(line["path"]), line["client"]) == (200, "unknown")


# Refusals.


def test_refusals_are_paced_and_other_answers_are_not(monkeypatch, clock):
    pauses, statuses = [], []

    async def sleep(seconds):
        pauses.append(seconds)

    async def send(message):
        statuses.append(message["status"])

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": scope["status"]})

    async def ask_all():
        middleware = PaceMiddleware(app, clock)
        for status in [200] * 500 + [429] * 500:
            await middleware({"type": "http", "status": status}, None, send)

    monkeypatch.setattr("service.http.middleware.asyncio.sleep", sleep)
    asyncio.run(ask_all())
    assert statuses == [200] * 500 + [429] * 500
    # The clock stands still: a hundred at once, then one per 10 ms, up to a second.
    assert len(pauses) == pytest.approx(400, abs=1)  # sums of hundredths are rounded
    assert pauses[:99] == pytest.approx([n / 100 for n in range(1, 100)], abs=0.011)
    assert pauses[120:] == pytest.approx([1.0] * len(pauses[120:]))


# CORS.


def preflight(client, origin=PAGE, method="POST"):
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return client.options("/v1/detect", headers=headers)


def test_a_page_of_a_known_origin_may_call(serve_with, png):
    with serve_with(cors_origins=f"{PAGE}, http://localhost:3000", tokens="abc") as client:
        asked = preflight(client)  # browsers send no token with it
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        headers = {"Origin": PAGE, "Authorization": "Bearer abc"}
        answer = client.post("/v1/detect", content=png, headers=headers)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        refused = client.post("/v1/detect", content=png, headers={"Origin": PAGE})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == PAGE
        other = preflight(client, "https://evil.example")
        assert (other.status_code, "access-control-allow-origin" in other.headers) == (400, False)
        assert preflight(client, method="DELETE").status_code == 400


def test_a_star_allows_every_origin_without_credentials(serve_with, client):
    with serve_with(cors_origins="*") as other:
        asked = preflight(other, "https://anywhere.example")
    assert asked.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in asked.headers
    default = client.get("/health/live", headers={"Origin": PAGE})
    assert not [name for name in default.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "text", ["example.com", "https://a.b/", "https://a.b/c", "ftp://a.b", "x *"]
)
def test_an_origin_that_no_browser_would_send_is_refused(text):
    with pytest.raises(SettingsError, match=r"cors_origins: .* is no origin"):
        parse_origins(f"{PAGE},{text}")


def test_origins():
    assert parse_origins(f" {PAGE} ,, HTTP://localhost:1,*") == [PAGE, "HTTP://localhost:1", "*"]
