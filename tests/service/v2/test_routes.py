import time

import orjson
import pytest
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.core.settings import Settings
from service.engine.session import ServedModel
from service.v2 import schemas

INFER = "/v2/models/colours/infer"


class TestServer:
    @pytest.mark.parametrize("path", ["/v2", "/v2/"])
    def test_metadata_with_and_without_a_slash_and_no_redirect(self, client, path):
        response = client.get(path, follow_redirects=False)
        assert response.status_code == 200
        found = schemas.ServerMetadata.model_validate(response.json())
        assert found.name == "ghm-triton"
        assert "binary_tensor_data" in found.extensions

    def test_not_ready_while_stopping_and_still_alive(self, settings, model, problem):
        app = create_app(settings, model)
        app.state.service.draining = True
        client = TestClient(app)
        assert "stopping" in problem(client.get("/v2/health/ready"), 503)
        assert client.get("/v2/health/live").status_code == 200

    def test_not_ready_before_the_start_and_still_alive(self, in_trouble, problem):
        client = in_trouble[503]
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/colours/ready", "/v2/models/colours"):
            response = client.get(path)
            assert "the model is not loaded" in problem(response, 503)
            assert response.headers["retry-after"] == "1"

    def test_an_extension_that_only_other_clients_use(self, client, problem):
        detail = problem(client.post("/v2/models/colours/generate"), 404)
        assert "not among this service's extensions" in detail


class TestModel:
    @pytest.mark.parametrize("version", ["", "/versions/1"])
    def test_each_route_with_and_without_a_version(self, client, version):
        path = f"/v2/models/colours{version}"
        shown = {
            "": schemas.ModelMetadata,
            "/ready": schemas.ModelReady,
            "/config": schemas.ModelConfig,
            "/stats": schemas.Statistics,
        }
        for suffix, schema in shown.items():
            response = client.get(path + suffix)
            assert response.status_code == 200, suffix
            schema.model_validate(response.json())
        assert client.get(path).json()["versions"] == ["1"]

    @pytest.mark.parametrize("suffix", ["", "/ready", "/config", "/stats", "/infer"])
    @pytest.mark.parametrize("path", ["/v2/models/nobody", "/v2/models/colours/versions/9"])
    def test_unknown_models_and_versions(self, client, path, suffix, problem):
        method = "POST" if suffix == "/infer" else "GET"
        detail = problem(client.request(method, path + suffix), 404)
        assert "'nobody'" in detail or "'9'" in detail

    def test_versions_of_a_folder_are_told_apart(self, v2, tmp_path, write_detector, batch):
        for version in ("1", "2"):
            place = tmp_path / "colours" / f"{version}.onnx"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(write_detector(max_detections=int(version)).read_bytes())
        settings = Settings(models=tmp_path, threads=1, provider="cpu", reload_seconds=0)
        with TestClient(create_app(settings)) as client:
            while client.get("/v2/health/ready").status_code == 503:
                time.sleep(0)  # each request lets the warm-up go on
            assert client.get("/v2/models/colours").json()["versions"] == ["1", "2"]
            newest = client.post(INFER, **v2.json_request(batch)).json()
            assert newest["model_version"] == "2"
            older = client.post("/v2/models/colours/versions/1/infer", **v2.json_request(batch))
            assert older.json()["model_version"] == "1"
            assert v2.tensors(older)["scores"].shape == (2, 1)
            stats = client.get("/v2/models/colours/stats").json()["model_stats"]
            assert [one["execution_count"] for one in stats] == [1, 1]
            index = client.post("/v2/repository/index").json()
            assert [(one["version"], one["state"]) for one in index] == [
                ("1", "READY"),
                ("2", "READY"),
            ]


class TestRepository:
    def test_index(self, client):
        (only,) = client.post("/v2/repository/index").json()
        assert only == {"name": "colours", "version": "1", "state": "READY", "reason": ""}
        schemas.RepositoryModel.model_validate(only)
        for content in (b"{}", b'{"ready": true}', b'{"ready": false}'):
            assert client.post("/v2/repository/index", content=content).json() == [only]

    def test_index_of_what_is_not_ready(self, settings, model, detector):
        app = create_app(settings, ServedModel(read_detector(detector), provider="cpu"))
        client = TestClient(app)  # without its start, nothing warms up
        (only,) = client.post("/v2/repository/index").json()
        assert only["state"] == "LOADING"
        assert client.post("/v2/repository/index", content=b'{"ready": true}').json() == []

    @pytest.mark.parametrize("content", [b'{"ready": 1}', b"[]", b"{", b'{"ready": "yes"}'])
    def test_index_malformed(self, client, content, problem):
        problem(client.post("/v2/repository/index", content=content), 400)

    def test_index_does_not_read_more_than_a_question(self, client, problem):
        problem(client.post("/v2/repository/index", content=b" " * 65537), 413)

    def test_load_reads_the_file_again(self, tmp_path, detector, problem):
        path = tmp_path / "colours.onnx"
        path.write_bytes(detector.read_bytes())
        settings = Settings(
            model=path, model_control=True, threads=1, provider="cpu", reload_seconds=0
        )
        with TestClient(create_app(settings)) as client:
            loaded = client.post("/v2/repository/models/colours/load", content=b"{}")
            assert [one["state"] for one in loaded.json()] == ["READY"]
            path.write_bytes(b"broken")
            response = client.post("/v2/repository/models/colours/load")
            assert "colours.onnx" in problem(response, 409)
            (entry,) = client.post("/v2/repository/index").json()
            assert entry["state"] == "READY"
            assert entry["reason"]
            assert client.get("/v2/models/colours/ready").status_code == 200

    def test_load_takes_no_files_of_others(self, client, problem):
        content = orjson.dumps({"parameters": {"file:1/model.onnx": "AAAA"}})
        response = client.post("/v2/repository/models/colours/load", content=content)
        assert "file:1/model.onnx" in problem(response, 400)
        problem(client.post("/v2/repository/models/nobody/load"), 404)


class TestDocumented:
    def test_every_status_of_infer_is_real_and_no_other(
        self, v2, client, in_trouble, settings, model, batch, status_without_body
    ):
        fine = v2.json_request(batch)
        requests = {
            200: fine,
            400: {"content": b"x"},
            413: {"content": bytes(settings.max_upload_bytes + 1)},
            415: {"content": b"x", "headers": {"Content-Encoding": "br"}},
        }
        for status, request in requests.items():
            assert client.post(INFER, **request).status_code == status
        for status, other in in_trouble.items():
            assert other.post(INFER, **fine).status_code == status
        assert client.post("/v2/models/nobody/infer", **fine).status_code == 404
        slow = create_app(settings.model_copy(update={"receive_seconds": 0.01}), model)
        assert status_without_body(slow, INFER) == 408
        paths = client.get("/openapi.json").json()["paths"]
        for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
            documented = {int(status) for status in paths[path]["post"]["responses"]}
            assert documented == {*requests, *in_trouble, 404, 408}

    def test_the_clients_own_timeout_counts(self, v2, client, batch, problem):
        response = client.post(INFER, **v2.json_request(batch, parameters={"timeout": 1}))
        assert "0.001 ms" in problem(response, 504)

    def test_every_route_is_documented(self, client):
        paths = client.get("/openapi.json").json()["paths"]
        found = {(path, *methods) for path, methods in paths.items() if path.startswith("/v2")}
        model = {
            (f"/v2/models/{{name}}{version}{suffix}", "post" if suffix == "/infer" else "get")
            for version in ("", "/versions/{version}")
            for suffix in ("", "/ready", "/config", "/stats", "/infer")
        }
        assert found == model | {
            ("/v2", "get"),
            ("/v2/health/live", "get"),
            ("/v2/health/ready", "get"),
            ("/v2/models/stats", "get"),
            ("/v2/repository/index", "post"),
            ("/v2/repository/models/{name}/load", "post"),
        }

    def test_the_request_is_documented_without_references(self, client):
        paths = client.get("/openapi.json").json()["paths"]
        body = paths["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]
        assert set(body) == {"application/json", "application/octet-stream"}
        assert "$ref" not in str(body)
        properties = body["application/json"]["schema"]["properties"]
        assert set(properties) == {"id", "parameters", "inputs", "outputs"}
