"""Inference requests and answers of the protocol, as JSON alone or followed by binary tensors.

A body is JSON. If the header `Inference-Header-Content-Length` states the length of the JSON, the
bytes of tensors follow it in the order in which the JSON names them. A length of 0 is the
protocol's raw request: the body is the images alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from service.core.errors import short
from service.v2 import schemas
from service.v2.signature import Signature
from service.v2.tensors import (
    NAMES,
    Array,
    TensorSpec,
    from_binary,
    from_json,
    malformed,
    to_binary,
    to_json,
)

HEADER = "Inference-Header-Content-Length"

# JSON of a few bytes can parse to objects of hundreds. Honest requests have few strings, and can
# send numbers flat instead of in many lists.
_MOST_QUOTES = 2**14
_MOST_LISTS = 2**20

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class OutputFormat:
    """A requested output, as bytes or as JSON."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """A request to a model.

    Attributes:
        inputs: Arrays by name, each as the model's signature requires.
        outputs: In the order of the answer.
        id: The client's name for the request.
        timeout_ms: The client's own deadline; None if it has none.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[OutputFormat, ...]
    id: str | None = None
    timeout_ms: float | None = None


def parse_request(body: bytes, header_length: str | None, signature: Signature) -> InferRequest:
    """Parse an inference request.

    Args:
        body: The whole body, inflated.
        header_length: Value of `Inference-Header-Content-Length`; None if there is none.
        signature: The signature of the model.

    Returns:
        The request. Its arrays may share memory with `body`.

    Raises:
        ProblemError: 400 for whatever the protocol or the model does not allow, naming the value.
    """
    length = _header_length(header_length, len(body))
    if length == 0 and header_length is not None:
        return _raw_request(body, signature)
    request = parse_json(body[:length], schemas.InferenceRequest)
    parameters = request.parameters or schemas.RequestParameters()
    if parameters.sequence_id not in (None, 0, ""):
        raise malformed(
            f"sequence_id is {short(parameters.sequence_id)}, but detectors keep no state between"
            " requests"
        )
    return InferRequest(
        _inputs(request.inputs, memoryview(body)[length:], signature),
        _outputs(request.outputs or [], parameters.binary_data_output, signature),
        request.id,
        parameters.timeout / 1000 or None,  # microseconds; 0 is no limit
    )


def _header_length(text: str | None, size: int) -> int:
    if text is None:
        return size
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise malformed(f"{HEADER} must be a number of bytes, got {short(text)}")
    length = int(text)
    if length > size:
        raise malformed(f"{HEADER} is {length}, but the body has {size} bytes")
    return length


def _raw_request(body: bytes, signature: Signature) -> InferRequest:
    spec = signature.inputs[0]
    if -1 in spec.shape[1:]:
        raise malformed(
            f"{HEADER} is 0, but the shape of {spec.name} cannot be told from its bytes:"
            f" it is {list(spec.shape)}"
        )
    image_bytes = spec.dtype.itemsize * math.prod(spec.shape[1:])
    if not body or len(body) % image_bytes:
        raise malformed(
            f"{HEADER} is 0, so the body must be images of {image_bytes} bytes each;"
            f" it has {len(body)} bytes"
        )
    shape = (len(body) // image_bytes, *spec.shape[1:])
    images = from_binary(memoryview(body), spec.datatype, shape, spec.name)
    outputs = tuple(OutputFormat(output.name, binary=True) for output in signature.outputs)
    return InferRequest({spec.name: images}, outputs)


def parse_json(text: bytes, kind: type[T]) -> T:
    """Parse and validate JSON.

    Raises:
        ProblemError: 400 if the JSON is malformed, invalid, or larger in memory than any honest
            request.
    """
    if text.count(b'"') > _MOST_QUOTES:
        raise malformed(f"the JSON has more than {_MOST_QUOTES // 2} strings")
    if text.count(b"[") + text.count(b"{") > _MOST_LISTS:
        raise malformed(
            f"the JSON has more than {_MOST_LISTS} lists; send tensors flat, or as binary data"
        )
    try:
        return kind.model_validate(orjson.loads(text))
    except orjson.JSONDecodeError as error:
        raise malformed(f"the JSON is malformed: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the request"
        raise malformed(f"{where} is {short(first['input'])}: {first['msg']}") from error


def _inputs(
    tensors: list[schemas.InputTensor], binary: memoryview, signature: Signature
) -> dict[str, Array]:
    specs = {spec.name: spec for spec in signature.inputs}
    arrays: dict[str, Array] = {}
    start = 0
    for tensor in tensors:
        spec = _spec(tensor.name, "input", specs)
        if spec.name in arrays:
            raise malformed(f"input {spec.name} is given twice")
        arrays[spec.name], size = _input(tensor, spec, binary[start:])
        start += size
    for spec in signature.inputs:
        if spec.name not in arrays and not spec.optional:
            raise malformed(f"input {spec.name} is missing; given: {short(sorted(arrays))}")
    if start != len(binary):
        raise malformed(
            f"{len(binary)} bytes follow the JSON, but the inputs' binary_data_size add up to"
            f" {start}"
        )
    return arrays


def _input(tensor: schemas.InputTensor, spec: TensorSpec, binary: memoryview) -> tuple[Array, int]:
    """Return a tensor, and the number of bytes behind the JSON that it takes."""
    parameters = tensor.parameters or schemas.InputParameters()
    _refuse_shared_memory(parameters.shared_memory_region, f"input {spec.name}")
    shape = tuple(tensor.shape)
    taken = spec.checked(tensor.datatype, shape)
    size = parameters.binary_data_size
    if size is None:
        if tensor.data is None:
            raise malformed(f"input {spec.name} has neither data nor binary_data_size")
        return from_json(tensor.data, spec.datatype, shape, spec.name).reshape(taken), 0
    if tensor.data is not None:
        raise malformed(f"input {spec.name} has both data and binary_data_size")
    if size > len(binary):
        raise malformed(
            f"input {spec.name}: binary_data_size is {size}, but only {len(binary)} bytes are left"
            " behind the JSON"
        )
    return from_binary(binary[:size], spec.datatype, shape, spec.name).reshape(taken), size


def _spec(name: str, kind: str, specs: dict[str, TensorSpec]) -> TensorSpec:
    if name not in specs:
        raise malformed(f"no {kind} {short(name)}; this model has {', '.join(specs)}")
    return specs[name]


def _refuse_shared_memory(region: object, tensor: str) -> None:
    if region is not None:
        raise malformed(
            f"{tensor} is in shared memory region {short(region)},"
            " but this service reads and writes no shared memory"
        )


def _outputs(
    requested: list[schemas.OutputRequest], binary: bool, signature: Signature
) -> tuple[OutputFormat, ...]:
    specs = {spec.name: spec for spec in signature.outputs}
    outputs: dict[str, OutputFormat] = {}
    for output in requested:
        name = _spec(output.name, "output", specs).name
        if name in outputs:
            raise malformed(f"output {name} is asked for twice")
        parameters = output.parameters or schemas.OutputParameters()
        _refuse_shared_memory(parameters.shared_memory_region, f"output {name}")
        if parameters.classification is not None:
            raise malformed(
                f"output {name}: classification is {short(parameters.classification)},"
                " but these outputs are detections, which have no classification extension"
            )
        own = parameters.binary_data
        outputs[name] = OutputFormat(name, binary if own is None else own)
    return tuple(outputs.values()) or tuple(OutputFormat(name, binary) for name in specs)


def encode_answer(
    outputs: tuple[OutputFormat, ...],
    arrays: Mapping[str, Array],
    model: tuple[str, str],
    request_id: str | None,
) -> tuple[bytes, int | None]:
    """Encode an answer.

    Args:
        outputs: The outputs, in the order of the answer.
        arrays: At least these, by name.
        model: Name and version of the model.
        request_id: The client's id; left out if None.

    Returns:
        The body, and the length of its JSON; None if all of it is JSON.
    """
    tensors: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for output in outputs:
        array = arrays[output.name]
        tensor: dict[str, Any] = {
            "name": output.name,
            "datatype": NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if output.binary:
            binary.append(to_binary(array))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = to_json(array)
        tensors.append(tensor)
    named = {} if request_id is None else {"id": request_id}
    answer = {"model_name": model[0], "model_version": model[1], **named, "outputs": tensors}
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([text, *binary]), len(text) if binary else None
