import threading
from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from export.file import read_detector
from service.core.schema import DriftAnswer
from service.engine.session import ModelError, ServedModel


def test_live_and_ready(client):
    assert client.get("/health/live").json() == {"status": "alive"}
    assert client.get("/health/ready").json() == {
        "status": "ready",
        "models": [{"name": "colours", "version": "1", "ready": True, "problem": None}],
        "problems": [],
    }


def test_not_ready_while_it_is_draining_but_alive(serve_with):
    with serve_with() as client:
        client.app.state.service.draining = True
        response = client.get("/health/ready")
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert "stopping" in response.json()["error"]
        assert client.get("/health/live").status_code == 200


class SlowModel(ServedModel):
    """A real model whose first inference lasts until it is let go, or fails."""

    failure: ModelError | None = None

    def run(self, *inputs, **options):
        self.go.wait()
        if self.failure is not None:
            raise self.failure
        return super().run(*inputs, **options)


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


def test_not_ready_until_the_model_has_answered(serve_with, slow):
    with serve_with(slow) as client:
        try:
            warming = wait_until(client, lambda r: "warming" in r.text)
            assert warming.status_code == 503
            assert client.get("/health/live").status_code == 200
            assert client.post("/v1/detect", content=b"x").status_code == 503
            assert client.get("/v1/models").status_code == 200
        finally:
            slow.go.set()
        assert wait_until(client, lambda r: r.status_code == 200).json()["status"] == "ready"


def test_a_model_that_fails_its_warm_up_is_never_ready_and_says_why(serve_with, slow):
    slow.failure = ModelError("out of luck")
    slow.go.set()
    with serve_with(slow) as client:
        response = wait_until(client, lambda r: "failed" in r.text)
    assert response.status_code == 503
    assert response.json()["error"] == "not ready: the model failed its warm-up: out of luck"


def test_the_start_loads_and_warms_the_model(serve_with):
    with serve_with(None) as client:
        wait_until(client, lambda r: r.status_code == 200)
        assert client.app.state.service.registry.get().card.name == "colours"


@pytest.fixture
def judged(write_detector, card, serve_with):
    """A service whose card has evidence, all of it for high scores."""
    held_out = {
        "positive_scores": [[0] * 190 + [50] * 10] * 3,
        "negative_scores": [[0] * 200] * 3,
    }
    path = write_detector(statistics=replace(card.statistics, **held_out))
    model = ServedModel(read_detector(path), provider="cpu")
    model.warm_up()
    with serve_with(model) as client:
        yield client


def samples(client) -> list[str]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [one.name for family in families for one in family.samples]


def test_metrics_of_real_requests(judged, png):
    judged.post("/v1/detect", content=png)
    judged.get("/made/up/1")
    judged.get("/made/up/2")
    text = judged.get("/metrics").text
    assert (
        'ghm_request_duration_seconds_count{method="POST",route="/v1/detect",status="200"} 1.0'
        in text
    )
    assert 'ghm_request_duration_seconds_count{method="GET",route="other",status="404"} 2.0' in text
    assert "/made/up" not in text
    for colour in ("red", "green", "blue"):
        assert f'ghm_detections_total{{class="{colour}",model="colours",version="1"}} 1.0' in text
    for stage in ("read", "decode", "queue", "inference", "encode"):
        assert f'ghm_stage_duration_seconds_count{{stage="{stage}"}} 1.0' in text, stage


def test_both_kinds_of_text_are_what_their_headers_say(client):
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert list(text_string_to_metric_families(plain.text))
    headers = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = client.get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert list(openmetrics(answer.text))


def test_without_metrics_there_are_none(serve_with):
    with serve_with(metrics=False) as client:
        assert client.get("/metrics").status_code == 404
        assert "/metrics" not in client.get("/openapi.json").json()["paths"]
        assert client.get("/v1/models/colours/drift").is_success


def test_drift_of_real_requests(judged, png):
    before = DriftAnswer.model_validate(judged.get("/v1/models/colours/drift").json())
    assert before.mix.held_out == [500, 500, 500]
    assert before.mix.live == [0, 0, 0]
    assert [one.scores.drift for one in before.classes] == ["unknown"] * 3
    assert before.classes[0].edges[0] == 0.5
    for _ in range(3):
        judged.post("/v1/detect", content=png)
    after = DriftAnswer.model_validate(judged.get("/v1/models/colours/drift").json())
    assert all(count > 2.9 for count in after.mix.live)
    for one in after.classes:
        assert len(one.edges) == len(one.scores.live) + 1 == len(one.scores.held_out) + 1
        assert sum(one.scores.held_out) == 500
        assert sum(one.scores.live) > 2.9
    judged.post("/v1/detect?threshold=0.9", content=png)
    judged.post("/v1/detect?iou=0.9", content=png)
    judged.post("/v1/detect?classes=red", content=png)
    same = DriftAnswer.model_validate(judged.get("/v1/models/colours/drift").json())
    assert same == after  # only requests at the file's own values are compared


def test_many_of_the_same_image_drift(judged, png, problem):
    for _ in range(14):
        judged.post("/v1/detect", files=[("files", png)] * 16)
    answer = judged.get("/v1/models/colours/drift", params={"version": "1"}).json()
    assert [one["scores"]["drift"] for one in answer["classes"]] == ["major"] * 3
    assert answer["mix"]["drift"] == "stable"
    names = samples(judged)
    assert names.count("ghm_drift_psi") == 3
    assert names.count("ghm_drift_class_mix_psi") == 1
    problem(judged.get("/v1/models/colours/drift", params={"version": "9"}), 404)
    problem(judged.get("/v1/models/nobody/drift"), 404)
