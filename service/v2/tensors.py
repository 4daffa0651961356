"""Tensors of the Open Inference Protocol: as JSON, as raw bytes, and as numpy arrays.

On the wire a tensor is row-major and little-endian, without gaps. Whatever a client sends is
checked here before memory is taken for it; every refusal names the tensor and the value.
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

_MOST_DIMENSIONS = 8

# What JSON may hold for each kind of datatype.
_ELEMENTS: dict[str, set[type]] = {"b": {bool}, "f": {int, float}, "i": {int}, "u": {int}}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor of a model is.

    Attributes:
        name: Its name.
        datatype: By the protocol's names.
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
        """Refuse a tensor that is not of this kind.

        Args:
            datatype: As a request states it.
            shape: As `read_shape` returns it.

        Returns:
            The shape as the model takes it. What holds for a whole request may come with a batch
            dimension of 1, as clients send it that know only batched inputs.

        Raises:
            ProblemError: 400 for a datatype or shape that the model does not take.
        """
        if datatype != self.datatype:
            known = isinstance(datatype, str) and (datatype in DTYPES or datatype in _OTHERS)
            what = "" if known else ", which is no datatype of the protocol"
            raise malformed(
                f"input {self.name} must be {self.datatype}, got {short(datatype)}{what}"
            )
        if shape == (1, *self.shape):  # never where any size goes: -1 is in no shape given
            return self.shape
        fits = len(shape) == len(self.shape) and all(
            got >= 1 and wanted in (-1, got) for wanted, got in zip(self.shape, shape, strict=True)
        )
        if not fits:
            raise malformed(
                f"input {self.name} must have shape {list(self.shape)} (-1: any size from 1),"
                f" got {short(list(shape))}"
            )
        return shape


def malformed(detail: str) -> ProblemError:
    """A request that is not what the protocol, or the model, asks for."""
    return ProblemError(400, detail)


def read_shape(value: object, name: str) -> tuple[int, ...]:
    """A shape as a request states it.

    Args:
        value: What JSON held.
        name: The tensor, for errors.

    Returns:
        Its dimensions, none negative.

    Raises:
        ProblemError: 400 for anything but a list of a few whole numbers from 0.
    """
    if not isinstance(value, list):
        raise malformed(f"input {name}: shape must be a list of integers, got {short(value)}")
    if len(value) > _MOST_DIMENSIONS:
        raise malformed(f"input {name}: shape has {len(value)} dimensions")
    for size in value:
        if type(size) is not int or size < 0:  # a bool is an int, and no size
            raise malformed(f"input {name}: shape must hold integers from 0, got {short(value)}")
    return tuple(value)


def from_binary(data: memoryview, datatype: str, shape: Sequence[int], name: str) -> Array:
    """A tensor from its bytes.

    Args:
        data: The bytes, of this tensor alone.
        datatype: By the protocol's names, one of `DTYPES`.
        shape: As `read_shape` returns it.
        name: The tensor, for errors.

    Returns:
        An aligned array in native byte order; it may share memory with `data`.

    Raises:
        ProblemError: 400 where the bytes are not as many as the shape needs.
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
    return np.require(array, dtype, ["C", "A"])  # behind JSON of any length, it may lie anywhere


def from_json(data: object, datatype: str, shape: Sequence[int], name: str) -> Array:
    """A tensor from the numbers that JSON held.

    Args:
        data: A flat list in row-major order, or lists in lists as the shape says.
        datatype: By the protocol's names, one of `DTYPES`.
        shape: As `read_shape` returns it.
        name: The tensor, for errors.

    Returns:
        The array. Numbers become the nearest of a floating datatype.

    Raises:
        ProblemError: 400 where the numbers are not as many as the shape says, lists are uneven,
            or an element is no number of this datatype.
    """
    flat = _flatten(data, shape, name)
    dtype = DTYPES[datatype]
    _check_elements(flat, dtype, datatype, name)
    with np.errstate(over="ignore"):
        array = np.array(flat, dtype)
    if dtype.kind == "f" and not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])  # JSON holds no infinity by itself
        raise malformed(f"input {name}: {short(flat[place])} is beyond {datatype}")
    return array.reshape(shape)


def _flatten(data: object, shape: Sequence[int], name: str) -> list[Any]:
    if not isinstance(data, list):
        raise malformed(f"input {name}: data must be a list, got {short(data)}")
    total = math.prod(shape)
    level, depth = data, 0
    while level and isinstance(level[0], list):
        wanted = [shape[depth], shape[depth + 1]] if depth + 1 < len(shape) else None
        if wanted is None or set(map(type, level)) != {list} or set(map(len, level)) != {wanted[1]}:
            raise malformed(f"input {name}: data is not nested as shape {short(list(shape))} says")
        level = list(chain.from_iterable(level))
        depth += 1
    if len(level) != total:
        raise malformed(
            f"input {name}: data holds {len(level)} elements,"
            f" but shape {short(list(shape))} has {total}"
        )
    return level


def _check_elements(flat: list[Any], dtype: np.dtype[Any], datatype: str, name: str) -> None:
    """Exact types: Python would take True for 1, and 1.5 for 1."""
    allowed = _ELEMENTS[dtype.kind]
    if not set(map(type, flat)) <= allowed:
        wrong = next(value for value in flat if type(value) not in allowed)
        raise malformed(f"input {name}: {short(wrong)} is no {datatype}")
    if dtype.kind in "iu" and flat:
        limits = np.iinfo(dtype)
        for value in (min(flat), max(flat)):
            if not limits.min <= value <= limits.max:
                raise malformed(f"input {name}: {short(value)} is beyond {datatype}")


def to_binary(array: Array) -> bytes:
    """The bytes of a tensor, as `from_binary` reads them."""
    if sys.byteorder == "big":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def to_json(array: Array) -> Array:
    """The numbers of a tensor, flat, as orjson writes arrays.

    A float32 is widened first: printed as a float64 it is exactly the number that the bytes hold,
    whichever precision a client reads it with.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.astype(np.float64) if array.dtype.kind == "f" else flat
