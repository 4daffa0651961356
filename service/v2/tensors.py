"""Tensors of the Open Inference Protocol: as JSON, as raw bytes, and as numpy arrays.

On the wire a tensor is row-major and little-endian, without gaps. Everything from a client is
checked before memory is taken for it; every refusal names the tensor and the value.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.errors import ProblemError, short

Array = npt.NDArray[Any]

# Every datatype of the protocol whose elements have a size, except BF16, which numpy lacks.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
}
NAMES: dict[np.dtype[Any], str] = {dtype: name for name, dtype in DTYPES.items()}

# The protocol's other datatypes. No input of a detector has one.
_OTHERS = ("BF16", "BYTES")

# The Python types that JSON may hold for each kind of datatype.
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "f": {int, float}, "i": {int}, "u": {int}}


def malformed(detail: str) -> ProblemError:
    """Return a 400 for a request that the protocol or the model does not allow."""
    return ProblemError(400, detail)


@dataclass(frozen=True)
class TensorSpec:
    """The name, type and shape of a model's tensor.

    Attributes:
        name: Name of the tensor.
        datatype: The protocol's name of its type.
        shape: -1 stands for any size from 1.
        optional: Whether a request may leave it out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numpy type of its elements."""
        return DTYPES[self.datatype]

    def checked(self, datatype: object, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Check the type and the shape that a request states.

        Returns:
            The shape as the model takes it. An input for the whole request may come with a batch
            dimension of 1: some clients know only batched inputs.

        Raises:
            ProblemError: 400 if the model does not take the type or the shape.
        """
        if datatype != self.datatype:
            known = isinstance(datatype, str) and (datatype in DTYPES or datatype in _OTHERS)
            hint = "" if known else ", which is no datatype of the protocol"
            raise malformed(
                f"input {self.name} must be {self.datatype}, got {short(datatype)}{hint}"
            )
        if shape == (1, *self.shape):  # never for a shape with -1, which no request has
            return self.shape
        matches = len(shape) == len(self.shape) and all(
            size >= 1 and expected in (-1, size)
            for expected, size in zip(self.shape, shape, strict=True)
        )
        if not matches:
            raise malformed(
                f"input {self.name} must have shape {list(self.shape)} (-1: any size from 1),"
                f" got {short(list(shape))}"
            )
        return shape


def from_binary(data: memoryview, datatype: str, shape: Sequence[int], name: str) -> Array:
    """Decode a tensor from its bytes.

    Args:
        data: The bytes of this tensor alone.
        datatype: One of `DTYPES`.
        shape: Non-negative sizes.
        name: Name of the tensor for error messages.

    Returns:
        An aligned array in native byte order; it may share memory with `data`.

    Raises:
        ProblemError: 400 if the number of bytes does not match the shape.
    """
    dtype = DTYPES[datatype]
    needed = math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
    if len(data) != needed:
        raise malformed(
            f"input {name}: binary_data_size is {len(data)},"
            f" but shape {short(list(shape))} of {datatype} needs {needed} bytes"
        )
    if dtype == np.bool_ and needed and np.frombuffer(data, np.uint8).max() > 1:
        raise malformed(f"input {name}: a BOOL is a byte of 0 or 1")
    array = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    return np.require(array, dtype, ["C", "A"])  # JSON of any length precedes the bytes


def from_json(data: object, datatype: str, shape: Sequence[int], name: str) -> Array:
    """Convert the numbers of a JSON list to a tensor.

    Args:
        data: A flat list in row-major order, or lists nested as the shape.
        datatype: One of `DTYPES`.
        shape: Non-negative sizes.
        name: Name of the tensor for error messages.

    Returns:
        The array; numbers are rounded to the nearest value of a floating datatype.

    Raises:
        ProblemError: 400 if the number of elements does not match the shape, lists are uneven, or
            an element is not of this datatype.
    """
    flat = _flatten(data, shape, name)
    dtype = DTYPES[datatype]
    # Exact types: Python would take True for 1, and numpy 1.5 for 1.
    allowed = _ELEMENTS[dtype.kind]
    if not set(map(type, flat)) <= allowed:
        wrong = next(value for value in flat if type(value) not in allowed)
        raise malformed(f"input {name}: {short(wrong)} is no {datatype}")
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        for value in (min(flat), max(flat)):
            if not limits.min <= value <= limits.max:
                raise malformed(f"input {name}: {short(value)} is beyond {datatype}")
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():  # JSON itself holds no infinity
        wrong = flat[int(np.flatnonzero(~np.isfinite(array))[0])]
        raise malformed(f"input {name}: {short(wrong)} is beyond {datatype}")
    return array.reshape(shape)


def _flatten(data: object, shape: Sequence[int], name: str) -> list[Any]:
    if not isinstance(data, list):
        raise malformed(f"input {name}: data must be a list, got {short(data)}")
    total = math.prod(shape)
    level, depth = data, 0
    while level and isinstance(level[0], list):
        depth += 1
        size = shape[depth] if depth < len(shape) else None
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise malformed(f"input {name}: data is not nested as shape {short(list(shape))}")
        level = list(chain.from_iterable(level))
    if len(level) != total:
        raise malformed(
            f"input {name}: data holds {len(level)} elements,"
            f" but shape {short(list(shape))} has {total}"
        )
    return level


def to_binary(array: Array) -> bytes:
    """Encode a tensor as the bytes that `from_binary` decodes."""
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def to_json(array: Array) -> Array:
    """Flatten a tensor for orjson.

    A float32 is widened first: printed as a float64 it is exactly the number in the binary form,
    at whichever precision a client reads it.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.astype(np.float64) if array.dtype.kind == "f" else flat
