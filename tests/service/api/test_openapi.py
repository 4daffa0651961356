import pytest
from PIL import Image
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.core.params import DetectOptions, PreviewOptions
from service.core.schema import DetectResponse
from service.engine.session import ModelError, ServedModel


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


class BrokenModel(ServedModel):
    """Loads and does not run."""

    def run(self, *inputs):
        raise ModelError("broken")


@pytest.fixture
def unready(settings) -> TestClient:
    return TestClient(create_app(settings))  # without its start, no model is loaded


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/thresholds/preview"])
def test_every_documented_status_of_detection_is_real_and_no_other(
    path, document, client, unready, settings, model, detector, png, encode, status_without_body
):
    broken = BrokenModel(read_detector(detector), provider="cpu")
    broken.warm = True
    late = settings.model_copy(update={"deadline_ms": 1e-6})
    busy = create_app(settings, model)
    busy.state.service.scheduler.in_flight = 1000
    requests = [
        (client, {"content": png}),
        (client, {"content": b""}),
        (client, {"content": png, "params": {"model": "x"}}),
        (client, {"content": encode(Image.new("L", (7000, 7000)))}),
        (client, {"content": b"x"}),
        (client, {"content": png, "params": {"iou": "2"}}),
        (TestClient(busy), {"content": png}),
        (TestClient(create_app(settings, broken)), {"content": png}),
        (unready, {"content": png}),
        (TestClient(create_app(late, model)), {"content": png}),
    ]
    real = [one.post(path, **request).status_code for one, request in requests]
    slow = create_app(settings.model_copy(update={"receive_seconds": 0.01}), model)
    real.insert(3, status_without_body(slow, path))
    assert real == [200, 400, 404, 408, 413, 415, 422, 429, 500, 503, 504]
    documented = document["paths"][path]["post"]["responses"]
    assert sorted(int(status) for status in documented) == real


def test_every_documented_status_of_the_others_is_real_and_no_other(
    document, client, unready, settings
):
    broken_app = create_app(settings)
    del broken_app.state.service
    broken = TestClient(broken_app)
    real = {
        "/v1/models": {one.get("/v1/models").status_code for one in (client, unready, broken)},
        "/v1/models/{name}": {
            client.get("/v1/models/x").status_code,
            *(one.get("/v1/models/colours").status_code for one in (client, unready, broken)),
        },
        "/v1/models/{name}/drift": {
            client.get("/v1/models/x/drift").status_code,
            *(one.get("/v1/models/colours/drift").status_code for one in (client, unready, broken)),
        },
        "/metrics": {one.get("/metrics").status_code for one in (client, unready, broken)},
        "/health/live": {one.get("/health/live").status_code for one in (client, unready, broken)},
        "/health/ready": {one.get("/health/ready").status_code for one in (client, unready)},
    }
    for path, statuses in real.items():
        responses = document["paths"][path]["get"]["responses"]
        assert {int(status) for status in responses} == statuses, path


def test_every_path_is_documented_with_its_only_method(document):
    paths = {path: list(operations) for path, operations in document["paths"].items()}
    assert {path: methods for path, methods in paths.items() if not path.startswith("/v2")} == {
        "/v1/detect": ["post"],
        "/v1/thresholds/preview": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{name}": ["get"],
        "/v1/models/{name}/drift": ["get"],
        "/v1/models/{name}/reload": ["post"],
        "/health/live": ["get"],
        "/health/ready": ["get"],
        "/metrics": ["get"],
    }


# What answers with something else than JSON alone.
KINDS = {
    "/metrics": ["application/openmetrics-text", "text/plain"],
    "/v1/detect": ["application/json", "image/jpeg", "image/png"],
}


def test_errors_are_documented_as_problems(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                kinds = sorted(response["content"])
                if int(status) >= 400:
                    assert kinds == ["application/problem+json"], (path, status)
                elif not path.startswith("/v2"):
                    assert kinds == KINDS.get(path, ["application/json"]), (path, status)


def test_every_kind_of_request_has_an_example(document):
    for path, options in (
        ("/v1/detect", DetectOptions),
        ("/v1/thresholds/preview", PreviewOptions),
    ):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {
            "multipart/form-data",
            "image/*",
            "application/octet-stream",
            "application/json",
        }
        for kind, described in content.items():
            assert described["examples"], (path, kind)
        own = {"file", "files", "image", "images"}
        for kind in ("multipart/form-data", "application/json"):
            assert set(content[kind]["schema"]["properties"]) - own == set(options.model_fields)


def test_json_examples_of_requests_are_answered(document, client):
    for path in ("/v1/detect", "/v1/thresholds/preview"):
        described = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        for example in described["examples"].values():
            assert client.post(path, json=example["value"]).status_code == 200


def references(part) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"]] if "$ref" in part else []
        return own + [found for value in part.values() for found in references(value)]
    return (
        [found for value in part for found in references(value)] if isinstance(part, list) else []
    )


def test_every_reference_leads_somewhere(document):
    found = references(document)
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_fastapis_own_errors_are_gone(document):
    assert "HTTPValidationError" not in str(document)


def test_options_are_documented_in_query_and_form(document):
    operation = document["paths"]["/v1/detect"]["post"]
    names = {parameter["name"]: parameter for parameter in operation["parameters"]}
    assert set(names) == set(DetectOptions.model_fields)
    form = operation["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {"file", "files", *DetectOptions.model_fields}
    assert names["threshold"]["schema"]["type"] == form["threshold"]["type"] == "number"
    assert names["max_detections"]["schema"]["type"] == "integer"


def test_answers_have_examples_that_are_valid(document):
    def example(name: str) -> dict:
        properties = document["components"]["schemas"][name]["properties"]
        return {field: schema["examples"][0] for field, schema in properties.items()}

    answer = {
        "model": "pets",
        "version": "1",
        "image": example("ImageSize"),
        "detections": [example("Detection")],
        "timings": example("Timings"),
    }
    DetectResponse.model_validate(answer)


def test_docs_page(client):
    assert client.get("/docs").status_code == 200
