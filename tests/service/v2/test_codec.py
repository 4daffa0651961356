import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.v2 import schemas
from service.v2.codec import OutputFormat, encode_answer, parse_json, parse_request
from service.v2.signature import Signature
from service.v2.tensors import TensorSpec

SMALL = Signature(
    (
        TensorSpec("images", "FP32", (-1, 2, 3)),
        TensorSpec("class_thresholds", "FP32", (2,), optional=True),
    ),
    (TensorSpec("scores", "FP32", (-1, 5)), TensorSpec("labels", "INT64", (-1, 5))),
)
NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensor(name: str, array: np.ndarray, *, binary: bool) -> tuple[dict, bytes]:
    described = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
    if binary:
        return {**described, "parameters": {"binary_data_size": array.nbytes}}, array.tobytes()
    return {**described, "data": array.astype(np.float64).ravel().tolist()}, b""


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(2), st.just(3)), elements=NUMBERS),
    hnp.arrays(np.float32, 2, elements=NUMBERS),
    st.tuples(st.booleans(), st.booleans()),
    st.booleans(),
    st.one_of(st.none(), st.text()),
)
def test_a_request_is_read_as_it_was_written(images, thresholds, binary, swapped, name):
    given = {"images": images, "class_thresholds": thresholds}
    parts = [tensor(*item, binary=flag) for item, flag in zip(given.items(), binary, strict=True)]
    parts = parts[::-1] if swapped else parts
    text = orjson.dumps({"id": name, "inputs": [described for described, _ in parts]})
    body = text + b"".join(content for _, content in parts)
    asked = parse_request(body, str(len(text)), SMALL)
    assert asked.id == name
    assert set(asked.inputs) == set(given)
    for key, array in given.items():
        assert asked.inputs[key].tobytes() == array.tobytes()
        assert asked.inputs[key].shape == array.shape
    assert asked.outputs == (OutputFormat("scores", False), OutputFormat("labels", False))


@given(st.data(), st.integers(1, 4), st.one_of(st.none(), st.text()))
def test_an_answer_is_the_same_in_json_and_in_bytes(data, images, name):
    scores = data.draw(hnp.arrays(np.float32, (images, 5), elements=NUMBERS))
    labels = data.draw(hnp.arrays(np.int64, (images, 5)))
    found = {"scores": scores, "labels": labels}
    for first, second in ((False, False), (True, True), (True, False), (False, True)):
        wanted = (OutputFormat("labels", first), OutputFormat("scores", second))
        body, length = encode_answer(wanted, found, ("m", "7"), name)
        assert (length is None) == (not first and not second)
        answer = orjson.loads(body[:length])
        assert (answer["model_name"], answer["model_version"]) == ("m", "7")
        assert answer.get("id", None) == name
        assert ("id" in answer) == (name is not None)
        assert [output["name"] for output in answer["outputs"]] == ["labels", "scores"]
        behind = body[length:] if length else b""
        for output in answer["outputs"]:
            expected = found[output["name"]]
            assert output["datatype"] == {"scores": "FP32", "labels": "INT64"}[output["name"]]
            assert output["shape"] == list(expected.shape)
            if "data" in output:
                content = np.array(output["data"], expected.dtype).tobytes()
            else:
                size = output["parameters"]["binary_data_size"]
                content, behind = behind[:size], behind[size:]
            assert content == expected.tobytes()
        assert behind == b""


@pytest.fixture
def image() -> dict:
    return {"name": "images", "datatype": "FP32", "shape": [1, 2, 3], "data": [0] * 6}


class TestOutputs:
    @pytest.mark.parametrize(
        ("asked", "expected"),
        [
            ({}, [("scores", False), ("labels", False)]),
            ({"outputs": []}, [("scores", False), ("labels", False)]),
            ({"outputs": None}, [("scores", False), ("labels", False)]),
            ({"parameters": {"binary_data_output": True}}, [("scores", True), ("labels", True)]),
            ({"outputs": [{"name": "labels"}]}, [("labels", False)]),
            (
                {"outputs": [{"name": "labels", "parameters": {"binary_data": True}}]},
                [("labels", True)],
            ),
            (
                {
                    "parameters": {"binary_data_output": True},
                    "outputs": [
                        {"name": "labels", "parameters": {"binary_data": False}},
                        {"name": "scores"},
                    ],
                },
                [("labels", False), ("scores", True)],
            ),
        ],
    )
    def test_the_request_chooses_and_each_output_over_it(self, asked, expected, image, frame):
        body, length = frame({"inputs": [image], **asked})
        found = parse_request(body, length, SMALL).outputs
        assert [(one.name, one.binary) for one in found] == expected


class TestParameters:
    @pytest.mark.parametrize(
        ("given", "expected"), [({}, None), ({"timeout": 0}, None), ({"timeout": 2500}, 2.5)]
    )
    def test_timeout_is_in_microseconds_and_0_is_none(self, given, expected, image, frame):
        body, length = frame({"inputs": [image], "parameters": given})
        assert parse_request(body, length, SMALL).timeout_ms == expected

    @pytest.mark.parametrize("given", [{"sequence_id": 0}, {"sequence_id": ""}, {"mine": "x"}])
    def test_what_asks_for_nothing_is_let_be(self, given, image, frame):
        body, length = frame({"inputs": [image], "parameters": given})
        assert parse_request(body, length, SMALL).id is None

    @pytest.mark.parametrize("given", [1, "a", True, -1])
    def test_a_sequence_is_refused(self, given, image, frame, refused):
        body, length = frame({"inputs": [image], "parameters": {"sequence_id": given}})
        detail = refused(400, parse_request, body, length, SMALL)
        assert f"sequence_id is {given!r}" in detail


def test_a_raw_request_is_images_and_asks_for_bytes(refused):
    array = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    asked = parse_request(array.tobytes(), "0", SMALL)
    assert asked.inputs["images"].tolist() == array.tolist()
    assert asked.outputs == (OutputFormat("scores", True), OutputFormat("labels", True))
    assert "24 bytes each" in refused(400, parse_request, array.tobytes()[1:], "0", SMALL)
    assert "has 0 bytes" in refused(400, parse_request, b"", "0", SMALL)


def test_the_bytes_of_one_tensor_are_not_taken_for_anothers(frame, refused):
    first = {"name": "images", "datatype": "FP32", "shape": [1, 2, 3]}
    second = {"name": "class_thresholds", "datatype": "FP32", "shape": [2]}
    sizes = {"parameters": {"binary_data_size": 28}}, {"parameters": {"binary_data_size": 4}}
    body, length = frame({"inputs": [first | sizes[0], second | sizes[1]]}, bytes(32))
    detail = refused(400, parse_request, body, length, SMALL)
    assert "images: binary_data_size is 28" in detail


class TestLengths:
    """Lies are named by the number that lies, not by what they lead to."""

    def test_of_the_json(self, image, frame, refused):
        body, _ = frame({"inputs": [image]})
        size = len(body)
        detail = refused(400, parse_request, body, str(size + 1), SMALL)
        assert detail.endswith(f"Content-Length is {size + 1}, but the body has {size} bytes")

    def test_of_a_tensor(self, frame, refused):
        tensor = {"name": "images", "datatype": "FP32", "shape": [1, 2, 3]}
        asked = {"inputs": [{**tensor, "parameters": {"binary_data_size": 24}}]}
        body, length = frame(asked, bytes(23))
        detail = refused(400, parse_request, body, length, SMALL)
        assert "binary_data_size is 24, but only 23 bytes are left" in detail


class TestBombs:
    """JSON that costs little to send and much to hold is refused before it is parsed."""

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"[" * 10**5, "the JSON"),
            (b'{"a":' * 10**5, "the JSON"),
            (b"[" * 10**5 + b"]" * 10**5, "the JSON"),
            (b'{"inputs":[' + b"[]," * 2**20 + b"1]}", "lists"),
            (b'{"inputs":[' + b"{}," * 2**20 + b"1]}", "lists"),
            (b'{"inputs":[' + b'"",' * 2**14 + b"1]}", "strings"),
            (b'{"inputs":[' + b"1," * 10**6 + b"1]}", "inputs"),
        ],
        ids=range(7),
    )
    def test_refused(self, text, reason, refused):
        assert reason in refused(400, parse_json, text, schemas.InferenceRequest)

    def test_an_honest_picture_nested_to_its_pixels_is_none(self):
        pixels = np.zeros((640, 480, 3), np.uint8).tolist()
        image = {"name": "images", "datatype": "UINT8", "shape": [640, 480, 3], "data": pixels}
        text = orjson.dumps({"inputs": [image]})
        assert len(parse_json(text, schemas.InferenceRequest).inputs[0].data) == 640
