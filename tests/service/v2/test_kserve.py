"""KServe's `InferenceRESTClient`, as version 0.21 writes its requests and reads the answers.

The package itself is too heavy to install for a test. What it sends was recorded from it, byte for
byte, against this service; what it reads is what its code asks of an answer.
"""

import httpx
import numpy as np
import orjson
import pytest

from service.images.decode import decode, prepare

SENT = {"accept": "*/*", "accept-encoding": "gzip, deflate", "user-agent": "python-httpx/0.28.1"}
OUTPUTS = ["boxes", "scores", "labels", "num_detections"]
DTYPES = {"FP32": np.float32, "INT64": np.int64}


@pytest.fixture(scope="module")
def client(live_service):
    with httpx.Client(base_url=live_service, headers=SENT) as client:
        yield client


@pytest.fixture(scope="module")
def batch(png, card) -> np.ndarray:
    row, _ = prepare(decode(png, 10**6), card)
    return np.stack([row, row[:, ::-1]]).astype(np.float32)


def request_of(
    batch: np.ndarray, *, sends_bytes: bool, takes_bytes: bool
) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request with an id, thresholds and every output named."""
    tensors = {"images": batch, "class_thresholds": np.array([0.1, 0.2, 0.3], np.float32)}
    inputs = [
        {"name": name, "shape": list(array.shape), "datatype": "FP32"}
        | (
            {"parameters": {"binary_data_size": array.nbytes}}
            if sends_bytes
            else {"data": array.ravel().tolist()}
        )
        for name, array in tensors.items()
    ]
    outputs = [{"name": name, "parameters": {"binary_data": takes_bytes}} for name in OUTPUTS]
    asked = {"id": "abc", "model_name": "colours", "inputs": inputs, "outputs": outputs}
    text = orjson.dumps(asked)
    if not sends_bytes:
        return text, {"content-type": "application/json"}
    headers = {
        "inference-header-content-length": str(len(text)),
        "content-type": "application/octet-stream",
    }
    return text + b"".join(array.tobytes() for array in tensors.values()), headers


def read_answer(response: httpx.Response) -> tuple[dict, dict[str, np.ndarray]]:
    """The answer as its `InferResponse.from_bytes` takes it apart."""
    assert response.is_success, response.text
    content = response.content
    length = int(response.headers.get("inference-header-content-length", len(content)))
    answer = orjson.loads(content[:length])
    found, start = {}, length
    for output in answer["outputs"]:
        parameters, dtype = output.get("parameters"), DTYPES[output["datatype"]]
        if parameters and "binary_data_size" in parameters:
            stop = start + parameters["binary_data_size"]
            array = np.frombuffer(content[start:stop], dtype)
            start = stop
        else:
            array = np.array(output["data"], dtype)
        found[output["name"]] = array.reshape(output["shape"])
    assert start == len(content)
    return answer, found


def test_health_is_read_from_the_bodies(client):
    assert client.get("/v2/health/live").json().get("live") is True
    assert client.get("/v2/health/ready").json().get("ready") is True
    assert client.get("/v2/models/colours/ready").is_success
    assert not client.get("/v2/models/nobody/ready").is_success


@pytest.mark.parametrize("sends_bytes", [True, False])
@pytest.mark.parametrize("takes_bytes", [True, False])
def test_infer(client, model, batch, sends_bytes, takes_bytes):
    content, headers = request_of(batch, sends_bytes=sends_bytes, takes_bytes=takes_bytes)
    response = client.post("/v2/models/colours/infer", content=content, headers=headers)
    answer, found = read_answer(response)
    assert (answer["id"], answer["model_name"]) == ("abc", "colours")
    assert response.headers["content-encoding"] == "gzip"
    expected = vars(model.run(batch, np.array([0.1, 0.2, 0.3], np.float32)))
    assert expected["num_detections"].min() >= 3
    for name in OUTPUTS:
        assert found[name].tobytes() == expected[name].tobytes()
        assert found[name].shape == expected[name].shape


def test_infer_of_a_plain_dictionary(client, model, batch):
    images = {"name": "images", "shape": [1, 3, 64, 96], "datatype": "FP32"}
    content = orjson.dumps({"inputs": [{**images, "data": batch[0].ravel().tolist()}]})
    headers = {"content-type": "application/json"}
    answer, found = read_answer(
        client.post("/v2/models/colours/infer", content=content, headers=headers)
    )
    assert answer.get("id") is None
    assert found["scores"].tobytes() == model.run(batch[:1]).scores.tobytes()


def test_errors_are_read_from_the_member_error(client):
    response = client.post(
        "/v2/models/nobody/infer",
        content=b'{"inputs":[]}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 404
    assert response.json()["error"] == "no model 'nobody'; there is colours"
