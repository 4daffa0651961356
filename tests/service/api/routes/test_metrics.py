from dataclasses import replace

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.core.schema import DriftAnswer
from service.core.settings import Settings
from service.engine.session import ServedModel


@pytest.fixture
def judged(write_detector, card):
    """A service whose card has evidence, all of it for high scores."""
    held_out = {
        "positive_scores": [[0] * 190 + [50] * 10] * 3,
        "negative_scores": [[0] * 200] * 3,
    }
    path = write_detector(statistics=replace(card.statistics, **held_out))
    settings = Settings(model=path, threads=1, provider="cpu")
    model = ServedModel(read_detector(path), provider="cpu")
    model.warm_up()
    with TestClient(create_app(settings, model)) as client:
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


def test_without_metrics_there_are_none(detector, model):
    settings = Settings(model=detector, threads=1, provider="cpu", metrics=False)
    with TestClient(create_app(settings, model)) as client:
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
