"""Triton Inference Server's own client, every call of it, against a real server."""

import asyncio
import inspect

import numpy as np
import pytest
import tritonclient.http as sync
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

from service.images.decode import decode, prepare
from service.v2.statistics import statistics_of

OUTPUTS = ["boxes", "scores", "labels", "num_detections"]

# Every call that this service answers.
ANSWERED = {
    "is_server_live",
    "is_server_ready",
    "is_model_ready",
    "get_server_metadata",
    "get_model_metadata",
    "get_model_config",
    "get_model_repository_index",
    "load_model",
    "get_inference_statistics",
    "infer",
    "async_infer",
}
# Every call of an extension that it does not have, with arguments.
REFUSED = {
    "unload_model": ("colours",),
    "update_trace_settings": (),
    "get_trace_settings": (),
    "update_log_settings": ({},),
    "get_log_settings": (),
    "get_system_shared_memory_status": (),
    "register_system_shared_memory": ("a", "/a", 8),
    "unregister_system_shared_memory": ("a",),
    "get_cuda_shared_memory_status": (),
    "register_cuda_shared_memory": ("a", b"handle", 0, 8),
    "unregister_cuda_shared_memory": ("a",),
}
# What sends nothing.
LOCAL = {"close", "generate_request_body", "parse_response_body"}
LOCAL |= {"plugin", "register_plugin", "unregister_plugin"}


@pytest.fixture
def address(live_service) -> str:
    return live_service.removeprefix("http://")


@pytest.fixture
def client(address):
    with sync.InferenceServerClient(address) as client:
        yield client


@pytest.fixture(scope="module")
def batch(png, card) -> np.ndarray:
    row, _ = prepare(decode(png, 10**6), card)
    return np.stack([row, row[:, ::-1]]).astype(np.float32)


def tensor(module, name: str, array: np.ndarray, *, binary: bool = True):
    made = module.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def found(result) -> dict[str, np.ndarray]:
    return {name: result.as_numpy(name) for name in OUTPUTS}


def same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(
        (one[name].dtype, one[name].shape, one[name].tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name in OUTPUTS
    )


@pytest.mark.parametrize(
    "made", [sync.InferenceServerClient, aio.InferenceServerClient], ids=["sync", "aio"]
)
def test_no_call_of_the_client_is_forgotten_here(made):
    calls = {name for name, _ in inspect.getmembers(made, callable) if not name.startswith("_")}
    assert calls <= ANSWERED | set(REFUSED) | LOCAL


def test_health_and_what_there_is(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert client.is_model_ready("colours", "1")
    assert not client.is_model_ready("nobody")
    assert not client.is_model_ready("colours", "9")
    assert client.get_server_metadata()["name"] == "ghm-triton"
    for version in ("", "1"):
        described = client.get_model_metadata("colours", version)
        configured = client.get_model_config("colours", version)
        assert [one["name"] for one in described["outputs"]] == OUTPUTS
        assert configured["max_batch_size"] == 64
        batched = [one for one in described["inputs"] if one["name"] == "images"]
        assert batched[0]["shape"][1:] == configured["input"][0]["dims"]


def test_repository(client):
    (only,) = client.get_model_repository_index()
    assert (only["name"], only["state"]) == ("colours", "READY")
    client.load_model("colours")
    with pytest.raises(InferenceServerException, match="loaded from their files"):
        client.load_model("colours", config="{}")


def test_statistics(client, batch):
    before = client.get_inference_statistics()["model_stats"][0]["inference_count"]
    client.infer("colours", [tensor(sync, "images", batch)])
    for name, version in (("", ""), ("colours", ""), ("colours", "1")):
        (found,) = client.get_inference_statistics(name, version)["model_stats"]
        assert found["inference_count"] == before + 2


@pytest.mark.parametrize("call", sorted(REFUSED))
def test_what_is_not_there_is_an_error_that_says_so(call, client):
    with pytest.raises(InferenceServerException) as caught:
        getattr(client, call)(*REFUSED[call])
    assert caught.value.status() == "404"
    assert "not among this service's extensions" in caught.value.message()


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("wants", [None, "gzip", "deflate"])
@pytest.mark.parametrize("sends_bytes", [True, False])
@pytest.mark.parametrize("takes", [None, True, False])
def test_infer_however_it_is_sent_and_answered(
    client, model, batch, packed, wants, sends_bytes, takes
):
    outputs = takes if takes is None else [sync.InferRequestedOutput(n, takes) for n in OUTPUTS]
    result = client.infer(
        "colours",
        [tensor(sync, "images", batch, binary=sends_bytes)],
        outputs=outputs,
        request_id="a b",
        request_compression_algorithm=packed,
        response_compression_algorithm=wants,
    )
    expected = vars(model.run(batch))
    assert expected["num_detections"].tolist() == [3, 3]
    assert same_bits(found(result), expected)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a b", "colours", "1")


def test_infer_with_all_else_that_it_takes(client, model, batch):
    thresholds = np.array([0.9, 2, 0.2], np.float32)
    result = client.infer(
        "colours",
        [
            tensor(sync, "iou_threshold", np.array([0.5], np.float32)),
            tensor(sync, "images", batch),
            tensor(sync, "class_thresholds", thresholds, binary=False),
        ],
        model_version="1",
        outputs=[sync.InferRequestedOutput("scores"), sync.InferRequestedOutput("labels", False)],
        priority=1,
        timeout=5_000_000,
        parameters={"mine": "x"},
        query_params={"a": "b"},
        headers={"X-Mine": "y"},
    )
    expected = model.run(batch, thresholds, 0.5)
    assert result.as_numpy("scores").tobytes() == expected.scores.tobytes()
    assert result.as_numpy("labels").tobytes() == expected.labels.tobytes()
    assert result.as_numpy("boxes") is None


def test_infer_at_once(address, model, batch):
    with sync.InferenceServerClient(address, concurrency=4) as client:
        asked = [
            client.async_infer("colours", [tensor(sync, "images", batch[[i % 2]])])
            for i in range(12)
        ]
        results = [found(one.get_result()) for one in asked]
    for place, result in enumerate(results):
        assert same_bits(result, vars(model.run(batch[[place % 2]])))


def test_errors_reach_the_client_in_words(client, batch):
    wrong = sync.InferInput("images", [1, 3, 64, 96], "FP16")
    wrong.set_data_from_numpy(batch[:1].astype(np.float16))
    with pytest.raises(InferenceServerException, match="must be FP32, got 'FP16'") as caught:
        client.infer("colours", [wrong])
    assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no model 'nobody'"):
        client.infer("nobody", [tensor(sync, "images", batch)])
    with pytest.raises(InferenceServerException, match="sequence_id is 7"):
        client.infer("colours", [tensor(sync, "images", batch)], sequence_id=7)
    outputs = [sync.InferRequestedOutput("scores", class_count=2)]
    with pytest.raises(InferenceServerException, match="classification is 2"):
        client.infer("colours", [tensor(sync, "images", batch)], outputs=outputs)
    shared = sync.InferInput("images", list(batch.shape), "FP32")
    shared.set_shared_memory("region", batch.nbytes)
    with pytest.raises(InferenceServerException, match="shared memory"):
        client.infer("colours", [shared])


def test_the_asynchronous_client(address, model, batch):
    async def ask():
        async with aio.InferenceServerClient(address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("colours")
            assert not await client.is_model_ready("nobody")
            assert (await client.get_server_metadata())["name"] == "ghm-triton"
            assert (await client.get_model_metadata("colours", "1"))["versions"] == ["1"]
            assert (await client.get_model_config("colours"))["max_batch_size"] == 64
            assert len(await client.get_model_repository_index()) == 1
            await client.load_model("colours")
            stats = await client.get_inference_statistics("colours")
            assert stats["model_stats"][0]["name"] == "colours"
            for call, arguments in REFUSED.items():
                with pytest.raises(InferenceServerException, match="extensions"):
                    await getattr(client, call)(*arguments)
            with pytest.raises(InferenceServerException, match="no model 'nobody'"):
                await client.infer("nobody", [tensor(aio, "images", batch)])
            return await asyncio.gather(
                *(
                    client.infer(
                        "colours",
                        [tensor(aio, "images", batch, binary=binary)],
                        outputs=[aio.InferRequestedOutput(name, binary) for name in OUTPUTS],
                        request_id=str(packed),
                        request_compression_algorithm=packed,
                        response_compression_algorithm=packed,
                    )
                    for packed in (None, "gzip", "deflate")
                    for binary in (True, False)
                )
            )

    results = asyncio.run(ask())
    expected = vars(model.run(batch))
    assert all(same_bits(found(result), expected) for result in results)
    ids = [result.get_response()["id"] for result in results]
    assert ids == ["None", "None", "gzip", "gzip", "deflate", "deflate"]


def test_the_statistics_are_those_of_the_served_model(client, model, batch):
    before = statistics_of(model).images
    client.infer("colours", [tensor(sync, "images", batch)])
    assert statistics_of(model).images == before + 2
