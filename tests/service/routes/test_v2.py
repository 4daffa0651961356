import gzip
import time
import zlib

import numpy as np
import orjson
import pytest
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.images import decode, prepare
from service.model import ModelError, ServedModel
from service.settings import Settings
from service.v2 import inference, schemas
from service.v2.codec import HEADER
from service.v2.inference import LARGEST_PIXEL

INFER = "/v2/models/colours/infer"
OUTPUTS = ["boxes", "scores", "labels", "num_detections"]


@pytest.fixture(scope="module")
def batch(png, card) -> np.ndarray:
    """Two images, [2, 3, 64, 96]: three patches, and the same upside down."""
    row, _ = prepare(decode(png, 10**6), card)
    return np.stack([row, row[:, ::-1]]).astype(np.float32)


def binary_request(batch: np.ndarray, **more: object) -> dict:
    """The content and headers of a request that sends and wants bytes."""
    images = {
        "name": "images",
        "datatype": "UINT8" if batch.dtype == np.uint8 else "FP32",
        "shape": list(batch.shape),
        "parameters": {"binary_data_size": batch.nbytes},
    }
    more = {"parameters": {"binary_data_output": True}} | more
    text = orjson.dumps({"inputs": [images], **more})
    return {"content": text + batch.tobytes(), "headers": {HEADER: str(len(text))}}


def json_request(batch: np.ndarray, *others: dict, **more: object) -> dict:
    images = {
        "name": "images",
        "datatype": "FP32",
        "shape": list(batch.shape),
        "data": batch.ravel().tolist(),
    }
    return {"content": orjson.dumps({"inputs": [images, *others], **more})}


def tensors(response) -> dict[str, np.ndarray]:
    """The outputs of an answer, from its JSON or from the bytes behind it."""
    assert response.status_code == 200, response.text
    length = response.headers.get(HEADER)
    body = response.content
    kind = "application/json" if length is None else "application/octet-stream"
    assert response.headers["content-type"] == kind
    text, behind = (body, b"") if length is None else (body[: int(length)], body[int(length) :])
    answer = schemas.InferenceAnswer.model_validate_json(text)
    found = {}
    for output in answer.outputs:
        dtype = {"FP32": np.float32, "INT64": np.int64}[output.datatype]
        if output.data is None:
            size = output.parameters["binary_data_size"]
            found[output.name] = np.frombuffer(behind[:size], dtype).reshape(output.shape)
            behind = behind[size:]
        else:
            found[output.name] = np.array(output.data, dtype).reshape(output.shape)
    assert behind == b""
    return found


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    def bits(found):
        return [(name, array.dtype, array.shape, array.tobytes()) for name, array in found.items()]

    return bits(one) == bits(other)


class TestServer:
    @pytest.mark.parametrize("path", ["/v2", "/v2/"])
    def test_metadata_with_and_without_a_slash_and_no_redirect(self, client, path):
        response = client.get(path, follow_redirects=False)
        assert response.status_code == 200
        found = schemas.ServerMetadata.model_validate(response.json())
        assert found.name == "ghm-triton"
        assert "binary_tensor_data" in found.extensions

    def test_health(self, client):
        assert client.get("/v2/health/live").json() == {"live": True}
        assert client.get("/v2/health/ready").json() == {"ready": True}

    def test_not_ready_before_the_start(self, settings, problem):
        client = TestClient(create_app(settings))
        assert client.get("/v2/health/live").status_code == 200
        for path in ("/v2/health/ready", "/v2/models/colours/ready", "/v2/models/colours"):
            response = client.get(path)
            assert "the model is not loaded" in problem(response, 503)
            assert response.headers["retry-after"] == "1"
        assert problem(client.post(INFER, content=b"{}"), 503)

    def test_not_ready_while_stopping_and_still_alive(self, settings, model, problem):
        app = create_app(settings, model)
        app.state.service.draining = True
        client = TestClient(app)
        assert "stopping" in problem(client.get("/v2/health/ready"), 503)
        assert client.get("/v2/health/live").status_code == 200

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v2/logging"),
            ("POST", "/v2/logging"),
            ("GET", "/v2/trace/setting"),
            ("POST", "/v2/models/colours/trace/setting"),
            ("GET", "/v2/systemsharedmemory/status"),
            ("POST", "/v2/systemsharedmemory/region/a/register"),
            ("GET", "/v2/cudasharedmemory/region/a/status"),
            ("POST", "/v2/cudasharedmemory/unregister"),
            ("POST", "/v2/models/colours/generate"),
            ("POST", "/v2/repository/models/colours/unload"),
        ],
    )
    def test_extensions_that_are_not_there_say_so(self, client, method, path, problem):
        assert "not among this service's extensions" in problem(client.request(method, path), 404)


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

    def test_versions_of_a_folder_are_told_apart(self, tmp_path, write_detector, batch):
        for version in ("1", "2"):
            place = tmp_path / "colours" / f"{version}.onnx"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(write_detector(max_detections=int(version)).read_bytes())
        settings = Settings(models=tmp_path, threads=1, provider="cpu", reload_seconds=0)
        with TestClient(create_app(settings)) as client:
            while client.get("/v2/health/ready").status_code == 503:
                time.sleep(0)  # each request lets the warm-up go on
            assert client.get("/v2/models/colours").json()["versions"] == ["1", "2"]
            newest = client.post(INFER, **json_request(batch)).json()
            assert newest["model_version"] == "2"
            older = client.post("/v2/models/colours/versions/1/infer", **json_request(batch))
            assert older.json()["model_version"] == "1"
            assert tensors(older)["scores"].shape == (2, 1)
            stats = client.get("/v2/models/colours/stats").json()["model_stats"]
            assert [one["execution_count"] for one in stats] == [1, 1]
            index = client.post("/v2/repository/index").json()
            assert [(one["version"], one["state"]) for one in index] == [
                ("1", "READY"),
                ("2", "READY"),
            ]


class TestInfer:
    def test_finds_what_the_model_finds(self, client, model, batch):
        expected = vars(model.run(batch))
        found = tensors(client.post(INFER, **binary_request(batch)))
        assert found["num_detections"].tolist() == [3, 3]
        assert same_bits(found, expected)

    def test_bytes_and_json_say_the_same_bit_for_bit(self, client, batch):
        answers = [
            tensors(client.post(INFER, **request))
            for request in (
                binary_request(batch),
                json_request(batch),
                binary_request(batch, parameters={}),
                json_request(batch, parameters={"binary_data_output": True}),
                {"content": batch.tobytes(), "headers": {HEADER: "0"}},
            )
        ]
        assert answers[0]["scores"].any()
        assert all(same_bits(answers[0], answer) for answer in answers[1:])

    def test_outputs_are_chosen_and_ordered_by_the_request(self, client, batch):
        wanted = [
            {"name": "num_detections"},
            {"name": "boxes", "parameters": {"binary_data": True}},
        ]
        response = client.post(INFER, **json_request(batch, outputs=wanted))
        assert list(tensors(response)) == ["num_detections", "boxes"]
        answer = orjson.loads(response.content[: int(response.headers[HEADER])])
        assert answer["outputs"][0] == {
            "name": "num_detections",
            "datatype": "INT64",
            "shape": [2],
            "data": [3, 3],
        }

    def test_the_id_is_echoed_and_left_out_where_there_is_none(self, client, batch):
        named = client.post(INFER, **json_request(batch, id="Ä-7")).json()
        assert named["id"] == "Ä-7"
        assert (named["model_name"], named["model_version"]) == ("colours", "1")
        assert "id" not in client.post(INFER, **json_request(batch)).json()

    def test_thresholds_of_the_request_are_in_force(self, client, model, batch):
        strict = {"name": "class_thresholds", "datatype": "FP32", "shape": [3], "data": [2, 0.6, 2]}
        loose = {"name": "iou_threshold", "datatype": "FP32", "shape": [1], "data": [1]}
        found = tensors(client.post(INFER, **json_request(batch, strict)))
        assert found["num_detections"].tolist() == [1, 1]
        assert set(found["labels"][:, 0].tolist()) == {1}
        low = strict | {"data": [0.3, 0.3, 0.3]}
        found = tensors(client.post(INFER, **json_request(batch, low, loose)))
        thresholds = np.full(3, 0.3, np.float32)
        assert same_bits(found, vars(model.run(batch, thresholds, 1.0)))
        fewer = tensors(client.post(INFER, **json_request(batch, low)))
        assert fewer["num_detections"].sum() < found["num_detections"].sum()

    def test_a_model_that_takes_pictures(self, settings, uint8_detector, uint8_model, image):
        app = create_app(settings.model_copy(update={"model": uint8_detector}), uint8_model)
        with TestClient(app) as client:
            picture = np.asarray(image)[None]
            found = tensors(client.post(INFER, **binary_request(picture)))
            assert found["num_detections"].tolist() == [3]
            assert same_bits(found, vars(uint8_model.run(picture)))

    @pytest.mark.parametrize("shape", [(1, 1, 4000, 3), (1, 2000, 1, 3), (1, 1, 1, 3)])
    def test_pictures_of_odd_shapes(self, settings, uint8_detector, uint8_model, shape):
        app = create_app(settings.model_copy(update={"model": uint8_detector}), uint8_model)
        with TestClient(app) as client:
            tensors(client.post(INFER, **binary_request(np.zeros(shape, np.uint8))))

    @pytest.mark.parametrize("images", [1, 16, 17, 64])
    def test_a_large_batch_runs_in_parts(self, settings, model, batch, images):
        """The answers are those of each image alone, in order."""
        app = create_app(settings, model)
        ran = []
        run = app.state.service.scheduler.run

        async def spied(served, part, wanted):
            ran.append(len(part))
            return await run(served, part, wanted)

        app.state.service.scheduler.run = spied
        many = np.repeat(batch, 32, axis=0)[np.random.default_rng(0).permutation(64)][:images]
        with TestClient(app) as client:
            found = tensors(client.post(INFER, **binary_request(many)))
        assert ran == [16] * (images // 16) + [images % 16] * (images % 16 > 0)
        for place, image in enumerate(many):
            alone = vars(model.run(image[None]))
            for name in OUTPUTS:
                assert found[name][place].tolist() == alone[name][0].tolist()

    def test_a_large_answer_is_written_off_the_event_loop(
        self, settings, model, batch, monkeypatch
    ):
        monkeypatch.setattr(inference, "_LARGE", vars(model.run(batch))["boxes"].nbytes - 1)
        app = create_app(settings, model)
        elsewhere = []
        decode = app.state.service.scheduler.decode

        async def spied(function, *arguments):
            elsewhere.append(function.__name__)
            return await decode(function, *arguments)

        app.state.service.scheduler.decode = spied
        with TestClient(app) as client:
            two, one = (client.post(INFER, **binary_request(part)) for part in (batch, batch[:1]))
        assert elsewhere == ["read", "_answer", "read"]
        assert same_bits(tensors(two), vars(model.run(batch)))
        assert same_bits(tensors(one), vars(model.run(batch[:1])))

    @pytest.mark.parametrize("kind", ["float32", "uint8"])
    def test_memory_is_counted_with_that_of_other_requests(
        self, settings, model, uint8_model, batch, image, kind
    ):
        served = model if kind == "float32" else uint8_model
        given = batch if kind == "float32" else np.asarray(image)[None]
        app = create_app(settings, served)
        budget, used = app.state.service.decoded, []
        run = app.state.service.scheduler.run

        async def spied(*arguments):
            used.append(budget.total - budget.free)
            return await run(*arguments)

        app.state.service.scheduler.run = spied
        with TestClient(app) as client:
            tensors(client.post(INFER, **binary_request(given)))
        # 128 x 192 pixels to 64 x 96: two input pixels wide and twice as many rows, and the 64.
        assert used == [given.nbytes if kind == "float32" else (128 + 64) * 96 * 2 * 3 * 4]
        assert budget.free == budget.total

    def test_refusals_are_counted_by_reason(self, settings, model, batch):
        app = create_app(settings.model_copy(update={"deadline_ms": 1e-6}), model)
        with TestClient(app) as client:
            client.post(INFER, **json_request(batch))
            client.post(INFER, content=bytes(settings.max_upload_bytes + 1))
        text, _ = app.state.service.metrics.render()
        for reason in ("deadline", "too_large"):
            assert f'ghm_rejected_requests_total{{reason="{reason}"}} 1.0'.encode() in text

    def test_the_largest_numbers_that_are_let_through_do_not_fail(self, client, batch):
        for value in (LARGEST_PIXEL, -LARGEST_PIXEL):
            tensors(client.post(INFER, **binary_request(np.full_like(batch, value))))

    @pytest.mark.parametrize("content_type", ["application/json", "text/plain", "", "x"])
    def test_content_types_are_let_be_as_clients_differ(self, client, batch, content_type):
        request = json_request(batch)
        response = client.post(INFER, **request, headers={"content-type": content_type})
        assert response.status_code == 200

    def test_a_header_that_is_given_twice(self, client, batch, problem):
        request = binary_request(batch)
        length = request["headers"][HEADER]
        twice = [(HEADER, length), (HEADER, "5")]
        detail = problem(client.post(INFER, content=request["content"], headers=twice), 400)
        assert f"as {length} and as 5" in detail
        same = [(HEADER, length), (HEADER, length)]
        assert client.post(INFER, content=request["content"], headers=same).status_code == 200

    def test_counts_what_it_answered(self, client, batch, model):
        def stats() -> dict:
            response = client.get("/v2/models/stats").json()
            return schemas.Statistics.model_validate(response).model_stats[0]

        before = stats()
        client.post(INFER, **json_request(batch))
        client.post(INFER, content=b"{}")
        after = stats()
        assert after.inference_count - before.inference_count == 2
        assert after.execution_count - before.execution_count == 1
        assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
        parts = after.inference_stats
        known = [parts.compute_input, parts.compute_infer, parts.compute_output]
        assert sum(part.ns for part in known) <= parts.success.ns + parts.fail.ns

    def test_metrics_count_it_and_drift_only_what_the_file_decided(self, settings, model, batch):
        app = create_app(settings, model)
        with TestClient(app) as client:
            monitor, _ = app.state.service.metrics.drift(model)
            client.post(INFER, **json_request(batch))
            seen = monitor.live.copy()
            loose = {"name": "iou_threshold", "datatype": "FP32", "shape": [1], "data": [0.5]}
            client.post(INFER, **json_request(batch, loose))
            text, _ = app.state.service.metrics.render()
        assert seen.sum() > 0
        assert monitor.live.tolist() == seen.tolist()
        assert b'ghm_images_total{model="colours",version="1"} 4.0' in text
        assert b'ghm_stage_duration_seconds_count{stage="encode"} 2.0' in text


class TestCompression:
    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    def test_both_ways(self, client, batch, coding):
        request = binary_request(batch)
        plain = client.post(INFER, **request)
        pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
        headers = {**request["headers"], "Content-Encoding": coding, "Accept-Encoding": coding}
        packed = client.post(INFER, content=pack(request["content"]), headers=headers)
        assert packed.headers["content-encoding"] == coding
        assert packed.headers["vary"] == "Accept-Encoding"
        assert int(packed.headers["content-length"]) < len(packed.content)  # httpx inflates
        assert same_bits(tensors(packed), tensors(plain))

    def test_not_where_it_is_not_asked_for(self, client, batch):
        request = binary_request(batch)
        headers = {**request["headers"], "Accept-Encoding": "identity"}
        response = client.post(INFER, content=request["content"], headers=headers)
        assert "content-encoding" not in response.headers
        tensors(response)

    def test_other_codings(self, client, problem):
        headers = {"Content-Encoding": "br"}
        response = client.post(INFER, content=b"x", headers=headers)
        assert "'br'" in problem(response, 415)
        assert response.headers["accept-encoding"] == "gzip, deflate"

    def test_a_bomb(self, client, problem):
        bomb = gzip.compress(bytes(100 * 2**20), 6)
        assert len(bomb) < 2**17
        response = client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
        assert "256-fold" in problem(response, 413)

    def test_the_limit_is_of_inflated_bytes(self, settings, model, batch, problem):
        request = binary_request(np.zeros_like(batch))
        size = len(request["content"])
        headers = {**request["headers"], "Content-Encoding": "gzip"}
        for limit, status in ((size, 200), (size - 1, 413)):
            app = create_app(settings.model_copy(update={"max_upload_bytes": limit}), model)
            with TestClient(app) as client:
                content = gzip.compress(request["content"])
                response = client.post(INFER, content=content, headers=headers)
                assert response.status_code == status


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
        settings = Settings(model=path, threads=1, provider="cpu", reload_seconds=0)
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


class BrokenModel(ServedModel):
    """Loads and does not run."""

    def run(self, *inputs):
        raise ModelError("broken")


class TestDocumented:
    def test_every_status_of_infer_is_real_and_no_other(
        self, client, settings, model, detector, batch
    ):
        broken = BrokenModel(read_detector(detector), provider="cpu")
        broken.warm = True
        late = create_app(settings.model_copy(update={"deadline_ms": 1e-6}), model)
        busy = create_app(settings, model)
        busy.state.service.scheduler.in_flight = 1000
        fine = json_request(batch)
        real = [
            client.post(INFER, **fine),
            client.post(INFER, content=b"x"),
            client.post("/v2/models/nobody/infer", **fine),
            client.post(INFER, content=bytes(settings.max_upload_bytes + 1)),
            client.post(INFER, content=b"x", headers={"Content-Encoding": "br"}),
            TestClient(busy).post(INFER, **fine),
            TestClient(create_app(settings, broken)).post(INFER, **fine),
            TestClient(create_app(settings)).post(INFER, **fine),
            TestClient(late).post(INFER, **fine),
        ]
        statuses = [response.status_code for response in real]
        assert statuses == [200, 400, 404, 413, 415, 429, 500, 503, 504]
        paths = client.get("/openapi.json").json()["paths"]
        for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
            assert sorted(map(int, paths[path]["post"]["responses"])) == statuses

    def test_the_clients_own_timeout_counts(self, client, batch, problem):
        response = client.post(INFER, **json_request(batch, parameters={"timeout": 1}))
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
