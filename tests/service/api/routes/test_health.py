import threading

import numpy as np
import pytest
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.engine.session import ModelError, ServedModel


def test_live_and_ready(client):
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").json() == {
        "status": "ready",
        "models": [{"name": "colours", "version": "1", "ready": True, "problem": None}],
        "problems": [],
    }


def test_not_ready_while_it_is_draining_but_alive(settings, model):
    app = create_app(settings, model)
    with TestClient(app) as client:
        app.state.service.draining = True
        response = client.get("/health/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "stopping" in response.json()["error"]
        assert client.get("/health/live").status_code == 200


class SlowModel(ServedModel):
    """A real model whose first inference lasts until it is let go, or fails."""

    failure: ModelError | None = None

    def detect(self, *inputs):
        self.go.wait()
        if self.failure is not None:
            raise self.failure
        return super().detect(*inputs)


@pytest.fixture
def slow(detector):
    model = SlowModel(read_detector(detector), provider="cpu")
    model.go = threading.Event()
    return model


def wait_until(client, predicate):
    """Ask until the answer satisfies; each request lets the background run on."""
    for _ in range(10_000):
        response = client.get("/health/ready")
        if predicate(response):
            return response
    pytest.fail(f"still {response.text}")


def test_not_ready_until_the_model_has_answered(settings, slow):
    with TestClient(create_app(settings, slow)) as client:
        try:
            warming = wait_until(client, lambda r: "warming" in r.text)
            assert warming.status_code == 503
            assert client.get("/health/live").status_code == 200
            assert client.post("/v1/detect", content=b"x").status_code == 503
            assert client.get("/v1/models").status_code == 200
        finally:
            slow.go.set()
        assert wait_until(client, lambda r: r.status_code == 200).json()["status"] == "ready"


def test_a_model_that_fails_its_warm_up_is_never_ready_and_says_why(settings, slow):
    slow.failure = ModelError("out of luck")
    slow.go.set()
    with TestClient(create_app(settings, slow)) as client:
        response = wait_until(client, lambda r: "failed" in r.text)
    assert response.status_code == 503
    assert response.json()["error"] == "not ready: the model failed its warm-up: out of luck"


def test_the_start_loads_and_warms_the_model(settings):
    app = create_app(settings)
    with TestClient(app) as client:
        wait_until(client, lambda r: r.status_code == 200)
        assert app.state.service.registry.get().card.name == "colours"
        assert np.isfinite(
            app.state.service.registry.get().detect(np.zeros((1, 3, 64, 96), "f4"))[0].boxes
        ).all()
