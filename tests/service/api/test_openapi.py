import pytest
from PIL import Image
from starlette.testclient import TestClient

from service.app import create_app
from service.core.detections import DetectOptions, PreviewOptions
from service.core.schema import DetectResponse


@pytest.fixture(scope="module")
def document(client):
    return client.get("/openapi.json").json()


@pytest.mark.parametrize("path", ["/v1/detect", "/v1/thresholds/preview"])
def test_every_documented_status_of_detection_is_real_and_no_other(
    path, document, client, in_trouble, settings, model, png, encode, status_without_body
):
    requests = {
        200: {"content": png},
        400: {"content": b""},
        404: {"content": png, "params": {"model": "x"}},
        413: {"content": encode(Image.new("L", (7000, 7000)))},
        415: {"content": b"x"},
        422: {"content": png, "params": {"iou": "2"}},
    }
    for status, request in requests.items():
        assert client.post(path, **request).status_code == status
    for status, other in in_trouble.items():
        assert other.post(path, content=png).status_code == status
    slow = create_app(settings.model_copy(update={"receive_seconds": 0.01}), model)
    assert status_without_body(slow, path) == 408
    documented = document["paths"][path]["post"]["responses"]
    assert {int(status) for status in documented} == {*requests, *in_trouble, 408}


@pytest.mark.parametrize(
    ("path", "name", "unloaded"),
    [
        ("/v1/models", None, 503),
        ("/v1/models/{name}", "x", 503),
        ("/v1/models/{name}/drift", "x", 503),
        ("/metrics", None, 200),
        ("/health/live", None, 200),
        ("/health/ready", None, 503),
    ],
)
def test_every_documented_status_of_the_others_is_real_and_no_other(
    document, client, in_trouble, settings, path, name, unloaded
):
    broken = create_app(settings)
    del broken.state.service
    url = path.format(name="colours")
    real = {client.get(url).status_code, in_trouble[503].get(url).status_code}
    assert real == {200, unloaded}
    if not path.startswith("/health"):
        real.add(TestClient(broken).get(url).status_code)
    if name:
        real.add(client.get(path.format(name=name)).status_code)
    assert {int(status) for status in document["paths"][path]["get"]["responses"]} == real


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
    assert "HTTPValidationError" not in str(document)  # FastAPI's own
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


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
