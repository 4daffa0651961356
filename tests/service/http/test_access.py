import asyncio
import logging
from contextlib import suppress

import pytest
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from service.app import create_app
from service.core.settings import Settings
from service.engine.session import ModelError
from service.http.middleware import AccessMiddleware

SECRET = "s3cret-token-of-ours"  # noqa: S105  made up


class Seen:
    """Remembers what it was told."""

    def __init__(self):
        self.requests = []

    def request(self, route, method, status, seconds):
        assert seconds >= 0
        self.requests.append((route, method, status))


@pytest.fixture
def facts(caplog):
    """The facts of the access lines so far."""
    caplog.set_level(logging.DEBUG, logger="ghm.access")

    def read():
        return [one.facts for one in caplog.records if one.name == "ghm.access"]

    return read


def test_a_line_for_a_detection(client, png, facts):
    response = client.post("/v1/detect?threshold=0.5", content=png)
    (line,) = facts()
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
        ("/made/up/by/anybody", "other", 404),
        ("/openapi.json", "other", 200),
    ],
)
def test_routes_are_templates(client, facts, path, route, status):
    client.get(path)
    (line,) = facts()
    assert (line["path"], line["route"], line["status"]) == (path, route, status)


def test_checks_of_health_are_for_who_debugs(client, caplog):
    caplog.set_level(logging.DEBUG, logger="ghm.access")
    for path in ("/health/live", "/metrics", "/v1/models", "/health/nothing"):
        client.get(path)
    levels = [one.levelname for one in caplog.records if one.name == "ghm.access"]
    assert levels == ["DEBUG", "DEBUG", "INFO", "INFO"]  # a check that fails is news


def test_an_error_that_nobody_expected_is_a_500(settings, model, png, facts, monkeypatch):
    def fail(*inputs):
        raise ModelError("broken")

    monkeypatch.setattr(model, "run", fail)
    with TestClient(create_app(settings, model)) as client:
        client.post("/v1/detect", content=png)
        counted = client.get("/metrics").text
    assert facts()[0]["status"] == 500
    assert 'route="/v1/detect",status="500"} 1.0' in counted


def test_neither_tokens_nor_images_get_into_the_log(detector, model, png, caplog):
    caplog.set_level(logging.DEBUG)
    guarded = Settings(model=detector, threads=1, provider="cpu", tokens=f"me:{SECRET}")
    with TestClient(create_app(guarded, model)) as client:
        headers = {"Authorization": f"Bearer {SECRET}", "Cookie": f"a={SECRET}"}
        client.post(f"/v1/detect?key={SECRET}", content=png, headers=headers)
        client.get("/v1/models", headers={"Authorization": f"Bearer {SECRET}x"})
    said = [one for one in caplog.records if one.name.startswith("ghm")]
    assert [one.facts["status"] for one in said if one.name == "ghm.access"] == [422, 401]
    text = repr([(one.getMessage(), vars(one)) for one in said])
    assert SECRET not in text
    assert "PNG" not in text
    assert "'token': 'me'" in text


def run(app, scope_changes=None, messages=()) -> Seen:
    """What an application that is no service of ours looks like from here."""
    seen = Seen()
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/x",
        "headers": [],
        **(scope_changes or {}),
    }
    waiting = list(messages)

    async def receive():
        return waiting.pop(0)

    async def send(message):
        pass

    middleware = AccessMiddleware(app, seen)
    with suppress(ClientDisconnect, ZeroDivisionError, asyncio.CancelledError):
        asyncio.run(middleware(scope, receive, send))
    return seen


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"12", "more_body": True})
    await send({"type": "http.response.body", "body": b"345"})


def test_a_client_that_goes_away(facts):
    async def gone(scope, receive, send):
        raise ClientDisconnect

    async def dropped(scope, receive, send):
        raise asyncio.CancelledError

    async def silent(scope, receive, send):
        pass

    for app in (gone, dropped, silent):
        assert run(app).requests == [("other", "GET", 499)]
    assert [line["status"] for line in facts()] == [499] * 3


def test_an_error_after_the_answer_began_keeps_its_status(facts):
    async def half(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ZeroDivisionError

    assert run(half).requests == [("other", "GET", 200)]


def test_bytes_are_those_that_went_by(facts):
    async def echo(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await answer(scope, receive, send)

    parts = [{"type": "http.request", "body": b"x" * n, "more_body": n != 3} for n in (10, 3)]
    run(echo, messages=parts)
    (line,) = facts()
    assert (line["bytes_in"], line["bytes_out"]) == (13, 5)


def test_methods_and_long_paths_are_bounded(facts):
    seen = run(answer, {"method": "MAKEUP", "path": "/" + "x" * 5000})
    assert seen.requests == [("other", "other", 200)]
    assert len(facts()[0]["path"]) == 200


def test_a_client_without_an_address(facts):
    run(answer, {"client": None})
    assert facts()[0]["client"] == "unknown"


def test_other_connections_pass():
    passed = []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    run(app, {"type": "lifespan"})
    assert passed == ["lifespan"]
