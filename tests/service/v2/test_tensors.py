import json
import math

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from service.v2.tensors import (
    DTYPES,
    NAMES,
    TensorSpec,
    from_binary,
    from_json,
    to_binary,
    to_json,
)


@st.composite
def tensors(draw):
    """A datatype of the protocol and an array of it, every bit pattern of finite numbers."""
    name = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    finite = {"allow_nan": False, "allow_infinity": False} if name.startswith("FP") else None
    return name, draw(hnp.arrays(DTYPES[name], shape, elements=finite))


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@given(tensors(), st.integers(0, 9))
def test_binary_round_trip_wherever_the_bytes_lie(tensor, offset):
    name, array = tensor
    data = memoryview(bytes(offset) + to_binary(array))[offset:]
    back = from_binary(data, name, array.shape, "x")
    assert same_bits(back, array)
    assert back.flags.aligned
    assert back.flags.c_contiguous


@given(tensors())
def test_json_round_trip_bit_for_bit_through_another_reader_too(tensor):
    name, array = tensor
    text = orjson.dumps(to_json(array), option=orjson.OPT_SERIALIZE_NUMPY)
    assert same_bits(from_json(orjson.loads(text), name, array.shape, "x"), array)
    # Python's own reader, and a client that never hears of float32.
    wide = np.array(json.loads(text), np.float64 if name.startswith("FP") else array.dtype)
    assert wide.astype(array.dtype).tobytes() == array.tobytes()


@given(tensors())
def test_nested_json_is_the_same_tensor(tensor):
    name, array = tensor
    if array.ndim and array.size:
        assert same_bits(from_json(array.tolist(), name, array.shape, "x"), array)


def test_float32_is_written_as_the_number_that_it_is():
    text = orjson.dumps(to_json(np.array([0.1], np.float32)), option=orjson.OPT_SERIALIZE_NUMPY)
    assert text == b"[0.10000000149011612]"  # not 0.1, which is another number in float64


def test_binary_is_little_endian_and_row_major():
    array = np.array([[1, 2], [3, 4]], np.int64)
    expected = b"".join(int(value).to_bytes(8, "little") for value in (1, 2, 3, 4))
    assert to_binary(array) == expected
    assert to_binary(array.T) == to_binary(np.ascontiguousarray(array.T))
    assert NAMES[array.dtype] == "INT64"


def test_shapes_as_large_as_they_may_be_do_not_overflow(refused):
    shape = (2**62, 2**62, 4)
    detail = refused(400, from_binary, memoryview(b""), "FP32", shape, "x")
    assert str(2**62 * 2**62 * 16) in detail
    assert str(math.prod(shape)) in refused(400, from_json, [], "FP32", shape, "x")


@pytest.mark.parametrize("size", [11, 13, 0])
def test_bytes_must_be_as_many_as_the_shape_needs(size, refused):
    detail = refused(400, from_binary, memoryview(bytes(size)), "FP32", (3,), "x")
    assert f"is {size}" in detail
    assert "needs 12 bytes" in detail


def test_bool_bytes_are_0_or_1(refused):
    assert "0 or 1" in refused(400, from_binary, memoryview(b"\x00\x02"), "BOOL", (2,), "x")


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("FP32", True),
        ("FP32", None),
        ("FP32", "1"),
        ("FP32", {}),
        ("FP32", 1e39),
        ("FP32", -1e39),
        ("FP16", 65520.0),
        ("UINT8", 256),
        ("UINT8", -1),
        ("UINT8", 1.0),
        ("UINT8", False),
        ("INT8", -129),
        ("INT64", 2**63),
        ("BOOL", 1),
    ],
)
def test_elements_that_are_none_of_the_datatype(datatype, value, refused):
    fine = [False] if datatype == "BOOL" else [1]
    detail = refused(400, from_json, [*fine, value], datatype, (2,), "x")
    assert detail.startswith("input x: ")
    assert repr(value) in detail
    assert datatype in detail


@pytest.mark.parametrize(
    "data",
    [
        [[1, 2, 3]],
        [[1, 2], [3, 4], [5, 6]],
        [[1, 2, 3], [4, 5]],
        [[1, 2, 3], 4],
        [1, [2, 3]],
        [[[1], [2], [3]], [[4], [5], [6]]],
        [[], []],
        [1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 6, 7],
        "123456",
        {},
        None,
    ],
)
def test_data_must_be_flat_or_nested_as_the_shape_says(data, refused):
    assert refused(400, from_json, data, "FP32", (2, 3), "x").startswith("input x")


def test_integers_are_numbers_of_a_floating_datatype():
    array = from_json([1, 2.5, 2**64 - 1], "FP32", (3,), "x")
    assert array.tolist() == [1.0, 2.5, 2.0**64]


class TestSpec:
    spec = TensorSpec("x", "FP32", (-1, 3))
    option = TensorSpec("y", "FP32", (3,), optional=True)

    @pytest.mark.parametrize("shape", [(1, 3), (64, 3)])
    def test_takes(self, shape):
        assert self.spec.checked("FP32", shape) == shape

    @pytest.mark.parametrize("shape", [(0, 3), (1, 2), (3,), (1, 1, 3), ()])
    def test_refuses_a_shape(self, shape, refused):
        detail = refused(400, self.spec.checked, "FP32", shape)
        assert str(list(shape)) in detail
        assert "[-1, 3]" in detail

    @pytest.mark.parametrize("datatype", ["FP16", "BF16", "BYTES", "UINT8"])
    def test_refuses_another_datatype(self, datatype, refused):
        detail = refused(400, self.spec.checked, datatype, (1, 3))
        assert detail == f"input x must be FP32, got '{datatype}'"

    @pytest.mark.parametrize("datatype", ["fp32", "FP8", None, 5, ["FP32"]])
    def test_says_of_what_is_no_datatype_that_it_is_none(self, datatype, refused):
        assert "no datatype" in refused(400, self.spec.checked, datatype, (1, 3))

    def test_what_holds_for_the_request_may_have_a_batch_of_one(self, refused):
        assert self.option.checked("FP32", (3,)) == (3,)
        assert self.option.checked("FP32", (1, 3)) == (3,)
        refused(400, self.option.checked, "FP32", (2, 3))
        refused(400, self.spec.checked, "FP32", (1, 1, 3))
