"""KServe's `InferenceRESTClient`, as version 0.21 writes its requests and reads the answers.

The package itself is too heavy to install for a test. Its requests were recorded byte for byte
against this service; answers are read as its code does.
"""

import httpx
import numpy as np
import orjson
import pytest

INFER = "/v2/models/colours/infer"
SENT = {"accept": "*/*", "accept-encoding": "gzip, deflate", "user-agent": "python-httpx/0.28.1"}
OUTPUTS = ["boxes", "scores", "labels", "num_detections"]


@pytest.fixture(scope="module")
def client(live_service):
    with httpx.Client(base_url=live_service, headers=SENT) as client:
        yield client


def request_of(batch: np.ndarray, *, sends_bytes: bool, takes_bytes: bool) -> dict:
    """A request with an id, thresholds and every output named."""
    arrays = {"images": batch, "class_thresholds": np.array([0.1, 0.2, 0.3], np.float32)}
    inputs = []
    for name, array in arrays.items():
        data = {"parameters": {"binary_data_size": array.nbytes}}
        if not sends_bytes:
            data = {"data": array.ravel().tolist()}
        inputs.append({"name": name, "shape": list(array.shape), "datatype": "FP32", **data})
    outputs = [{"name": name, "parameters": {"binary_data": takes_bytes}} for name in OUTPUTS]
    text = orjson.dumps(
        {"id": "abc", "model_name": "colours", "inputs": inputs, "outputs": outputs}
    )
    if not sends_bytes:
        return {"content": text, "headers": {"content-type": "application/json"}}
    headers = {
        "inference-header-content-length": str(len(text)),
        "content-type": "application/octet-stream",
    }
    content = text + b"".join(array.tobytes() for array in arrays.values())
    return {"content": content, "headers": headers}


def test_health_and_errors_are_read_from_the_bodies(client):
    assert client.get("/v2/health/live").json().get("live") is True
    assert client.get("/v2/health/ready").json().get("ready") is True
    assert client.get("/v2/models/colours/ready").is_success
    assert not client.get("/v2/models/nobody/ready").is_success
    headers = {"content-type": "application/json"}
    response = client.post("/v2/models/nobody/infer", content=b'{"inputs":[]}', headers=headers)
    assert response.status_code == 404
    assert response.json()["error"] == "no model 'nobody'; there is colours"


@pytest.mark.parametrize("sends_bytes", [True, False])
@pytest.mark.parametrize("takes_bytes", [True, False])
def test_infer(v2, client, model, batch, sends_bytes, takes_bytes):
    request = request_of(batch, sends_bytes=sends_bytes, takes_bytes=takes_bytes)
    response = client.post(INFER, **request)
    length = int(response.headers.get("inference-header-content-length", len(response.content)))
    answer = orjson.loads(response.content[:length])
    assert (answer["id"], answer["model_name"]) == ("abc", "colours")
    assert response.headers["content-encoding"] == "gzip"
    expected = vars(model.run(batch, np.array([0.1, 0.2, 0.3], np.float32)))
    assert expected["num_detections"].min() >= 3
    assert v2.same_bits(v2.tensors(response), expected)
