"""Triton Inference Server's own clients, every call of them, against a real server."""

import asyncio
import inspect

import numpy as np
import pytest
import tritonclient.http as sync
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

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
# Every call of an extension that is not supported, with arguments.
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
# Calls that send nothing.
LOCAL = {"close", "generate_request_body", "parse_response_body"}
LOCAL |= {"plugin", "register_plugin", "unregister_plugin"}


@pytest.fixture(scope="module")
def address(live_service) -> str:
    return live_service.removeprefix("http://")


@pytest.fixture(params=[sync, aio], ids=["sync", "aio"])
def ask(request, address):
    """Calls a method of a client of either kind."""

    def call(method: str, *arguments, **keywords):
        if request.param is sync:
            with sync.InferenceServerClient(address) as client:
                return getattr(client, method)(*arguments, **keywords)

        async def run():
            async with aio.InferenceServerClient(address) as client:
                return await getattr(client, method)(*arguments, **keywords)

        return asyncio.run(run())

    return call


def tensor(name: str, array: np.ndarray, *, binary: bool = True) -> sync.InferInput:
    made = sync.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def arrays(result) -> dict[str, np.ndarray]:
    return {name: result.as_numpy(name) for name in OUTPUTS}


@pytest.mark.parametrize(
    "made", [sync.InferenceServerClient, aio.InferenceServerClient], ids=["sync", "aio"]
)
def test_no_call_of_the_client_is_forgotten_here(made):
    calls = {name for name, _ in inspect.getmembers(made, callable) if not name.startswith("_")}
    assert calls <= ANSWERED | set(REFUSED) | LOCAL


def test_health_and_metadata(ask):
    assert ask("is_server_live")
    assert ask("is_server_ready")
    assert ask("is_model_ready", "colours")
    assert ask("is_model_ready", "colours", "1")
    assert not ask("is_model_ready", "nobody")
    assert not ask("is_model_ready", "colours", "9")
    assert ask("get_server_metadata")["name"] == "ghm-triton"
    for version in ("", "1"):
        described = ask("get_model_metadata", "colours", version)
        configured = ask("get_model_config", "colours", version)
        assert described["versions"] == ["1"]
        assert [one["name"] for one in described["outputs"]] == OUTPUTS
        assert configured["max_batch_size"] == 0
        batched = [one for one in described["inputs"] if one["name"] == "images"]
        assert batched[0]["shape"] == configured["input"][0]["dims"]


def test_repository(ask):
    (only,) = ask("get_model_repository_index")
    assert (only["name"], only["state"]) == ("colours", "READY")
    ask("load_model", "colours")
    with pytest.raises(InferenceServerException, match="loaded from their files"):
        ask("load_model", "colours", config="{}")


def test_statistics(ask, batch):
    before = ask("get_inference_statistics")["model_stats"][0]["inference_count"]
    ask("infer", "colours", [tensor("images", batch)])
    for name, version in (("", ""), ("colours", ""), ("colours", "1")):
        (one,) = ask("get_inference_statistics", name, version)["model_stats"]
        assert one["inference_count"] == before + 2


@pytest.mark.parametrize("call", sorted(REFUSED))
def test_an_unsupported_extension_is_an_error_with_the_reason(call, ask):
    with pytest.raises(InferenceServerException) as caught:
        ask(call, *REFUSED[call])
    assert caught.value.status() == "404"
    assert "not among this service's extensions" in caught.value.message()


@pytest.mark.parametrize(
    ("packed", "wants"), [(None, "gzip"), ("gzip", "deflate"), ("deflate", None)]
)
@pytest.mark.parametrize("sends_bytes", [True, False])
@pytest.mark.parametrize("takes", [None, True, False])
def test_infer(v2, ask, model, batch, packed, wants, sends_bytes, takes):
    outputs = takes if takes is None else [sync.InferRequestedOutput(n, takes) for n in OUTPUTS]
    result = ask(
        "infer",
        "colours",
        [tensor("images", batch, binary=sends_bytes)],
        outputs=outputs,
        request_id="a b",
        request_compression_algorithm=packed,
        response_compression_algorithm=wants,
    )
    expected = vars(model.run(batch))
    assert expected["num_detections"].tolist() == [3, 3]
    assert v2.same_bits(arrays(result), expected)
    answer = result.get_response()
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a b", "colours", "1")


def test_infer_with_all_other_arguments(ask, model, batch):
    thresholds = np.array([0.9, 2, 0.2], np.float32)
    result = ask(
        "infer",
        "colours",
        [
            tensor("iou_threshold", np.array([0.5], np.float32)),
            tensor("images", batch),
            tensor("class_thresholds", thresholds, binary=False),
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


def test_concurrent_requests(v2, address, model, batch):
    with sync.InferenceServerClient(address, concurrency=4) as client:
        images = [batch[[i % 2]] for i in range(12)]
        asked = [client.async_infer("colours", [tensor("images", one)]) for one in images]
        for one, image in zip(asked, images, strict=True):
            assert v2.same_bits(arrays(one.get_result()), vars(model.run(image)))


def test_errors_reach_the_client_in_words(ask, batch):
    images = [tensor("images", batch)]
    wrong = sync.InferInput("images", [1, 3, 64, 96], "FP16")
    wrong.set_data_from_numpy(batch[:1].astype(np.float16))
    shared = sync.InferInput("images", list(batch.shape), "FP32")
    shared.set_shared_memory("region", batch.nbytes)
    classified = [sync.InferRequestedOutput("scores", class_count=2)]
    for message, arguments, keywords in (
        (r"\[400\].*must be FP32, got 'FP16'", ("colours", [wrong]), {}),
        ("no model 'nobody'", ("nobody", images), {}),
        ("sequence_id is 7", ("colours", images), {"sequence_id": 7}),
        ("classification is 2", ("colours", images), {"outputs": classified}),
        ("shared memory", ("colours", [shared]), {}),
    ):
        with pytest.raises(InferenceServerException, match=message):
            ask("infer", *arguments, **keywords)
