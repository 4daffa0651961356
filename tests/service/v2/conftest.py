"""Requests of the Open Inference Protocol, as bytes."""

from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from ghm_triton.images.decode import decode
from service.images import prepare
from service.v2 import schemas
from service.v2.codec import HEADER
from service.v2.signature import Signature


@pytest.fixture(scope="session")
def signature(card) -> Signature:
    return Signature.of(card)


@pytest.fixture(scope="session")
def frame():
    """Puts JSON and the bytes of tensors together; returns the body and the header's value."""

    def put(asked: dict, *tensors: bytes) -> tuple[bytes, str | None]:
        text = orjson.dumps(asked)
        return b"".join([text, *tensors]), str(len(text)) if tensors else None

    return put


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def v2() -> SimpleNamespace:
    return SimpleNamespace(
        binary_request=binary_request,
        json_request=json_request,
        tensors=tensors,
        same_bits=same_bits,
    )
