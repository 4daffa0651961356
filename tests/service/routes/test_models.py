import hashlib

from starlette.testclient import TestClient

from export.contract import DetectorCard
from service.app import create_app
from service.schemas import ModelDetail, ModelList, ProblemDetails


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


def test_an_unknown_model_is_404_and_the_known_one_named(client):
    response = client.get("/v1/models/shapes")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
    detail = ProblemDetails.model_validate(response.json()).detail
    assert "'shapes'" in detail
    assert "'colours'" in detail


def test_before_the_model_is_loaded_503(settings):
    client = TestClient(create_app(settings))
    for path in ("/v1/models", "/v1/models/colours"):
        response = client.get(path)
        assert response.status_code == 503
        assert "not loaded" in response.json()["error"]
