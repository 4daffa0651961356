import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.http.direct import DirectMiddleware


@pytest.fixture
def slow_way(settings, model, monkeypatch):
    """The same service with nothing but FastAPI's routing."""
    monkeypatch.setattr("service.http.direct.install", lambda *_: None)
    with TestClient(create_app(settings, model)) as client:
        yield client


REQUESTS = [
    {"content": b"png"},
    {"content": b""},
    {"content": b"x"},
    {"content": b"png", "params": {"iou": "2"}},
    {"content": b"png", "params": {"model": "nobody"}},
    {"content": b"x", "headers": {"Content-Type": "text/plain"}},
]


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/thresholds/preview"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_both_ways_answer_alike(client, slow_way, path, request_, png):
    request_ = {**request_, "content": request_["content"].replace(b"png", png)}
    short, long = (one.post(path, **request_) for one in (client, slow_way))
    assert short.status_code == long.status_code
    assert short.headers["content-type"] == long.headers["content-type"]
    changing = ("timings", "request_id")
    bodies = [
        {key: value for key, value in one.json().items() if key not in changing}
        for one in (short, long)
    ]
    assert bodies[0] == bodies[1]


def test_the_short_way_is_taken_and_counted_by_its_route(settings, model, png, monkeypatch):
    seen = []
    original = DirectMiddleware.__call__

    async def watched(self, scope, receive, send):
        await original(self, scope, receive, send)
        if scope["type"] == "http":
            seen.append((scope["path"], "endpoint" in scope))  # set by FastAPI's routing alone

    monkeypatch.setattr(DirectMiddleware, "__call__", watched)
    with TestClient(create_app(settings, model)) as client:
        assert client.post("/v1/detect", content=png).status_code == 200
        assert client.get("/v1/models/colours").status_code == 200
        metrics = client.get("/metrics").text
    assert seen[:2] == [("/v1/detect", False), ("/v1/models/colours", True)]
    assert 'route="/v1/detect",status="200"' in metrics


def test_other_methods_and_paths_go_the_usual_way(client):
    assert client.get("/v1/detect").status_code == 405
    assert client.post("/v1/detect/", follow_redirects=False).status_code == 307
