import logging
import re

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.engine.session import ModelError


def test_every_answer_has_an_id_of_its_own(client):
    first, second = (client.get("/health/live").headers["x-request-id"] for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


def test_a_harmless_id_of_the_clients_is_kept(client):
    headers = {"X-Request-ID": "trace-1.a_B"}
    response = client.get("/nowhere", headers=headers)
    assert response.headers["x-request-id"] == response.json()["request_id"] == "trace-1.a_B"


@pytest.mark.parametrize("given", ["a b", "x" * 65, "a\tb", "é".encode("latin-1")])
def test_another_id_of_the_clients_is_replaced(client, given):
    response = client.get("/health/live", headers={"X-Request-ID": given})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.fixture
def broken(settings, model, monkeypatch):
    """A service whose model fails."""

    def fail(*inputs):
        raise ModelError("the secret insides")

    monkeypatch.setattr(model, "run", fail)
    with TestClient(create_app(settings, model)) as client:
        yield client


def test_an_unexpected_error_is_a_500_without_its_insides(broken, png, problem, caplog):
    with caplog.at_level(logging.ERROR, logger="ghm.service"):
        response = broken.post("/v1/detect", content=png)
    detail = problem(response, 500)
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "request_id" in detail
    assert response.headers["x-request-id"] in caplog.text
    assert "the secret insides" in caplog.text  # the log has the reason


def test_the_service_goes_on_after_an_error(broken, png):
    assert broken.post("/v1/detect", content=png).status_code == 500
    assert broken.get("/health/live").status_code == 200
