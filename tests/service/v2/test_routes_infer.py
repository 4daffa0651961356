"""`POST /v2/models/{name}/infer`: see test_v2.py for the other routes."""

import gzip
import zlib

import numpy as np
import orjson
import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.v2 import inference, schemas
from service.v2.codec import HEADER
from service.v2.inference import LARGEST_PIXEL

INFER = "/v2/models/colours/infer"
OUTPUTS = ["boxes", "scores", "labels", "num_detections"]


class TestInfer:
    def test_finds_what_the_model_finds(self, v2, client, model, batch):
        expected = vars(model.run(batch))
        found = v2.tensors(client.post(INFER, **v2.binary_request(batch)))
        assert found["num_detections"].tolist() == [3, 3]
        assert v2.same_bits(found, expected)

    def test_bytes_and_json_say_the_same_bit_for_bit(self, v2, client, batch):
        answers = [
            v2.tensors(client.post(INFER, **request))
            for request in (
                v2.binary_request(batch),
                v2.json_request(batch),
                v2.binary_request(batch, parameters={}),
                v2.json_request(batch, parameters={"binary_data_output": True}),
                {"content": batch.tobytes(), "headers": {HEADER: "0"}},
            )
        ]
        assert answers[0]["scores"].any()
        assert all(v2.same_bits(answers[0], answer) for answer in answers[1:])

    def test_outputs_are_chosen_and_ordered_by_the_request(self, v2, client, batch):
        wanted = [
            {"name": "num_detections"},
            {"name": "boxes", "parameters": {"binary_data": True}},
        ]
        response = client.post(INFER, **v2.json_request(batch, outputs=wanted))
        assert list(v2.tensors(response)) == ["num_detections", "boxes"]
        answer = orjson.loads(response.content[: int(response.headers[HEADER])])
        assert answer["outputs"][0] == {
            "name": "num_detections",
            "datatype": "INT64",
            "shape": [2],
            "data": [3, 3],
        }

    def test_the_id_is_echoed_and_left_out_where_there_is_none(self, v2, client, batch):
        named = client.post(INFER, **v2.json_request(batch, id="Ä-7")).json()
        assert named["id"] == "Ä-7"
        assert (named["model_name"], named["model_version"]) == ("colours", "1")
        assert "id" not in client.post(INFER, **v2.json_request(batch)).json()

    def test_thresholds_of_the_request_are_in_force(self, v2, client, model, batch):
        strict = {"name": "class_thresholds", "datatype": "FP32", "shape": [3], "data": [2, 0.6, 2]}
        loose = {"name": "iou_threshold", "datatype": "FP32", "shape": [1], "data": [1]}
        found = v2.tensors(client.post(INFER, **v2.json_request(batch, strict)))
        assert found["num_detections"].tolist() == [1, 1]
        assert set(found["labels"][:, 0].tolist()) == {1}
        low = strict | {"data": [0.3, 0.3, 0.3]}
        found = v2.tensors(client.post(INFER, **v2.json_request(batch, low, loose)))
        thresholds = np.full(3, 0.3, np.float32)
        assert v2.same_bits(found, vars(model.run(batch, thresholds, 1.0)))
        fewer = v2.tensors(client.post(INFER, **v2.json_request(batch, low)))
        assert fewer["num_detections"].sum() < found["num_detections"].sum()

    def test_a_model_that_takes_pictures(self, v2, settings, uint8_detector, uint8_model, image):
        app = create_app(settings.model_copy(update={"model": uint8_detector}), uint8_model)
        with TestClient(app) as client:
            picture = np.asarray(image)[None]
            found = v2.tensors(client.post(INFER, **v2.binary_request(picture)))
            assert found["num_detections"].tolist() == [3]
            assert v2.same_bits(found, vars(uint8_model.run(picture)))

    @pytest.mark.parametrize("shape", [(1, 1, 4000, 3), (1, 2000, 1, 3), (1, 1, 1, 3)])
    def test_pictures_of_odd_shapes(self, v2, settings, uint8_detector, uint8_model, shape):
        app = create_app(settings.model_copy(update={"model": uint8_detector}), uint8_model)
        with TestClient(app) as client:
            v2.tensors(client.post(INFER, **v2.binary_request(np.zeros(shape, np.uint8))))

    @pytest.mark.parametrize("images", [1, 16, 17, 64])
    def test_a_large_batch_runs_in_parts(self, v2, settings, model, batch, images):
        """The answers are those of each image alone, in order."""
        app = create_app(settings, model)
        ran = []
        run = app.state.service.scheduler.run

        async def spied(served, part, wanted, *rest):
            ran.append(len(part))
            return await run(served, part, wanted, *rest)

        app.state.service.scheduler.run = spied
        many = np.repeat(batch, 32, axis=0)[np.random.default_rng(0).permutation(64)][:images]
        with TestClient(app) as client:
            found = v2.tensors(client.post(INFER, **v2.binary_request(many)))
        assert ran == [16] * (images // 16) + [images % 16] * (images % 16 > 0)
        for place, image in enumerate(many):
            alone = vars(model.run(image[None]))
            for name in OUTPUTS:
                assert found[name][place].tolist() == alone[name][0].tolist()

    def test_a_large_answer_is_written_off_the_event_loop(
        self, v2, settings, model, batch, monkeypatch
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
            two, one = (
                client.post(INFER, **v2.binary_request(part)) for part in (batch, batch[:1])
            )
        assert elsewhere == ["read", "_answer", "read"]
        assert v2.same_bits(v2.tensors(two), vars(model.run(batch)))
        assert v2.same_bits(v2.tensors(one), vars(model.run(batch[:1])))

    @pytest.mark.parametrize("kind", ["float32", "uint8"])
    def test_memory_is_counted_with_that_of_other_requests(
        self, v2, settings, model, uint8_model, batch, image, kind
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
            v2.tensors(client.post(INFER, **v2.binary_request(given)))
        # 128 x 192 pixels to 64 x 96: two input pixels wide and twice as many rows, and the 64.
        assert used == [given.nbytes if kind == "float32" else (128 + 64) * 96 * 2 * 3 * 4]
        assert budget.free == budget.total

    def test_a_busy_service_does_not_read_what_it_would_refuse(self, settings, model, problem):
        app = create_app(settings, model)
        app.state.service.scheduler.in_flight = 1000
        problem(TestClient(app).post(INFER, content=b"malformed"), 429)

    def test_refusals_are_counted_by_reason(self, v2, settings, model, batch):
        app = create_app(settings.model_copy(update={"deadline_ms": 1e-6}), model)
        with TestClient(app) as client:
            client.post(INFER, **v2.json_request(batch))
            client.post(INFER, content=bytes(settings.max_upload_bytes + 1))
        text, _ = app.state.service.metrics.render()
        for reason in ("deadline", "too_large"):
            assert f'ghm_rejected_requests_total{{reason="{reason}"}} 1.0'.encode() in text

    def test_the_largest_numbers_that_are_let_through_do_not_fail(self, v2, client, batch):
        for value in (LARGEST_PIXEL, -LARGEST_PIXEL):
            v2.tensors(client.post(INFER, **v2.binary_request(np.full_like(batch, value))))

    @pytest.mark.parametrize("content_type", ["application/json", "text/plain", "", "x"])
    def test_content_types_are_let_be_as_clients_differ(self, v2, client, batch, content_type):
        request = v2.json_request(batch)
        response = client.post(INFER, **request, headers={"content-type": content_type})
        assert response.status_code == 200

    def test_a_header_that_is_given_twice(self, v2, client, batch, problem):
        request = v2.binary_request(batch)
        length = request["headers"][HEADER]
        twice = [(HEADER, length), (HEADER, "5")]
        detail = problem(client.post(INFER, content=request["content"], headers=twice), 400)
        assert f"as {length} and as 5" in detail
        same = [(HEADER, length), (HEADER, length)]
        assert client.post(INFER, content=request["content"], headers=same).status_code == 200

    def test_counts_what_it_answered(self, v2, client, batch, model):
        def stats() -> dict:
            response = client.get("/v2/models/stats").json()
            return schemas.Statistics.model_validate(response).model_stats[0]

        before = stats()
        client.post(INFER, **v2.json_request(batch))
        client.post(INFER, content=b"{}")
        after = stats()
        assert after.inference_count - before.inference_count == 2
        assert after.execution_count - before.execution_count == 1
        assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
        parts = after.inference_stats
        known = [parts.compute_input, parts.queue, parts.compute_infer, parts.compute_output]
        assert parts.queue.count == parts.compute_infer.count > 0
        assert sum(part.ns for part in known) <= parts.success.ns + parts.fail.ns

    def test_metrics_count_it_and_drift_only_what_the_file_decided(
        self, v2, settings, model, batch
    ):
        app = create_app(settings, model)
        with TestClient(app) as client:
            monitor, _ = app.state.service.metrics.drift(model)
            client.post(INFER, **v2.json_request(batch))
            seen = monitor.live.copy()
            loose = {"name": "iou_threshold", "datatype": "FP32", "shape": [1], "data": [0.5]}
            client.post(INFER, **v2.json_request(batch, loose))
            text, _ = app.state.service.metrics.render()
        assert seen.sum() > 0
        assert monitor.live.tolist() == seen.tolist()
        assert b'ghm_images_total{model="colours",version="1"} 4.0' in text
        assert b'ghm_stage_duration_seconds_count{stage="encode"} 2.0' in text


class TestCompression:
    @pytest.mark.parametrize("coding", ["gzip", "deflate"])
    def test_both_ways(self, v2, client, batch, coding):
        request = v2.binary_request(batch)
        plain = client.post(INFER, **request)
        pack = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
        headers = {**request["headers"], "Content-Encoding": coding, "Accept-Encoding": coding}
        packed = client.post(INFER, content=pack(request["content"]), headers=headers)
        assert packed.headers["content-encoding"] == coding
        assert packed.headers["vary"] == "Accept-Encoding"
        assert int(packed.headers["content-length"]) < len(packed.content)  # httpx inflates
        assert v2.same_bits(v2.tensors(packed), v2.tensors(plain))
