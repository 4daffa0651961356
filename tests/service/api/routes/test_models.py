import hashlib
from urllib.parse import quote

import pytest

from export.card import DetectorCard
from service.core.schema import ModelDetail, ModelList


def test_list(client, detector, card):
    response = client.get("/v1/models")
    assert response.status_code == 200
    (model,) = ModelList.model_validate(response.json()).models
    assert model.name == "colours"
    assert model.sha256 == hashlib.sha256(detector.read_bytes()).hexdigest()
    assert model.class_names == ["red", "green", "blue"]
    assert model.thresholds == dict(zip(card.class_names, card.class_thresholds, strict=True))
    assert model.threshold_policy == "f1"


def test_detail_has_the_whole_card(client, card):
    response = client.get("/v1/models/colours")
    assert response.status_code == 200
    detail = ModelDetail.model_validate(response.json())
    assert DetectorCard.model_validate(response.json()["card"]) == card
    assert detail.threshold_policy == card.threshold_policy
    assert detail.providers == ["CPUExecutionProvider"]


def test_reload_takes_what_the_file_holds_now(tmp_path, write_detector, serve_with):
    path = tmp_path / "served.onnx"
    path.write_bytes(write_detector().read_bytes())
    with serve_with(None, model=path) as client:
        before = client.get("/v1/models/colours").json()
        path.write_bytes(write_detector(backbone="another").read_bytes())
        (after,) = ModelList.model_validate(client.post("/v1/models/colours/reload").json()).models
        assert after.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before["sha256"]
        assert client.get("/v1/models/colours").json()["card"]["backbone"] == "another"


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"model_control": None}, 403),
        ({"model_control": False, "tokens": "secret"}, 403),
        ({"model_control": None, "tokens": "secret"}, 200),
        ({"model_control": True}, 200),
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/models/colours/reload", "/v2/repository/models/colours/load"]
)
def test_models_are_controlled_by_requests_where_that_is_allowed(serve_with, changes, status, path):
    with serve_with(**changes) as client:
        response = client.post(path, headers={"Authorization": "Bearer secret"})
    assert response.status_code == status
    assert status == 200 or "--model-control" in response.json()["detail"]


def test_a_bad_file_is_409_and_its_predecessor_serves(tmp_path, detector, serve_with, png):
    path = tmp_path / "served.onnx"
    path.write_bytes(detector.read_bytes())
    with serve_with(None, model=path, reload_seconds=0) as client:
        path.write_bytes(b"not a model")
        response = client.post("/v1/models/colours/reload")
        assert response.status_code == 409
        assert "served.onnx" in response.json()["error"]
        client.app.state.service.registry.get().warm_up()
        assert client.post("/v1/detect", content=png).status_code == 200
        ready = client.get("/health/ready").json()
        assert ready["models"][0]["ready"]
        assert "served.onnx" in ready["problems"][0]
        assert "served.onnx" in client.get("/v1/models/colours").json()["problem"]
        assert client.post("/v1/models/shapes/reload").status_code == 404


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/v1/models/shapes", "no model 'shapes'; there is colours"),
        ("/v1/models/colours?version=7", "no version '7' of 'colours'; there is 1"),
    ],
)
def test_an_unknown_model_is_404_and_the_known_ones_are_named(client, path, detail, problem):
    assert problem(client.get(path), 404) == detail


@pytest.mark.parametrize("name", ["cells/blood", "a\nb", "a?b#c", "versions/1"])
def test_models_of_any_name_can_be_addressed(write_detector, serve_with, name):
    part = quote(name, safe="")
    with serve_with(None, model=write_detector(name=name)) as client:
        assert client.get(f"/v1/models/{part}").json()["name"] == name
        assert client.get(f"/v1/models/{part}/drift").json()["model"] == name
        assert client.post(f"/v1/models/{part}/reload").status_code == 200
        for path in (f"/v2/models/{part}", f"/v2/models/{part}/versions/1"):
            assert client.get(path).json()["name"] == name
            assert client.get(f"{path}/config").json()["name"] == name
            assert client.get(f"{path}/stats").json()["model_stats"][0]["name"] == name
            assert client.post(f"{path}/infer", json={}).status_code in (400, 503)
        load = client.post(f"/v2/repository/models/{part}/load")
        assert load.json()[0]["name"] == name
