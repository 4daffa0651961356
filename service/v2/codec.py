"""Inference requests and answers of the protocol, JSON alone or with binary tensors behind it.

A body is JSON, and where the header `Inference-Header-Content-Length` says how long that is, the
bytes of tensors follow it in the order in which the JSON names them. A length of 0 is the
protocol's raw request: the body is the images and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from service.core.errors import short
from service.v2.signature import Signature
from service.v2.tensors import (
    NAMES,
    Array,
    TensorSpec,
    from_binary,
    from_json,
    malformed,
    read_shape,
    to_binary,
    to_json,
)

HEADER = "Inference-Header-Content-Length"

# JSON of a few bytes can stand for objects of hundreds: no honest request has so many strings, and
# one that has so many lists can send its numbers flat.
_MOST_QUOTES = 2**14
_MOST_LISTS = 2**20


@dataclass(frozen=True)
class WantedOutput:
    """An output that a request asks for, as bytes or as JSON."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """What a request asks of a model.

    Attributes:
        inputs: By name, each as the model's signature says.
        outputs: In the order of the answer.
        id: The client's name for the request.
        timeout_ms: How long the client waits; None where it does not say.
    """

    inputs: Mapping[str, Array]
    outputs: tuple[WantedOutput, ...]
    id: str | None = None
    timeout_ms: float | None = None


def parse_request(body: bytes, header_length: str | None, signature: Signature) -> InferRequest:
    """Read an inference request.

    Args:
        body: The whole body, inflated.
        header_length: The value of `Inference-Header-Content-Length`; None where there is none.
        signature: Of the model that is asked.

    Returns:
        The request. Arrays may share memory with `body`.

    Raises:
        ProblemError: 400 for whatever the protocol or the model does not allow. The message names
            the value at fault.
    """
    length = _header_length(header_length, len(body))
    if length == 0 and header_length is not None:
        return _raw(body, signature)
    asked = read_json(body[:length])
    parameters = _parameters(asked, "the request")
    _refuse_sequences(parameters)
    return InferRequest(
        _inputs(asked, memoryview(body)[length:], signature),
        _outputs(asked, parameters, signature),
        _id(asked),
        _timeout_ms(parameters),
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


def _raw(body: bytes, signature: Signature) -> InferRequest:
    images = signature.inputs[0]
    if -1 in images.shape[1:]:
        raise malformed(
            f"{HEADER} is 0, but the shape of {images.name} cannot be told from its bytes:"
            f" it is {list(images.shape)}"
        )
    each = images.dtype.itemsize
    for size in images.shape[1:]:
        each *= size
    if not body or len(body) % each:
        raise malformed(
            f"{HEADER} is 0, so the body must be images of {each} bytes each;"
            f" it has {len(body)} bytes"
        )
    shape = (len(body) // each, *images.shape[1:])
    array = from_binary(memoryview(body), images.datatype, shape, images.name)
    outputs = tuple(WantedOutput(spec.name, binary=True) for spec in signature.outputs)
    return InferRequest({images.name: array}, outputs)


def read_json(text: bytes) -> dict[str, Any]:
    """The object that a request's JSON holds.

    Raises:
        ProblemError: 400 for JSON that is malformed, or none of an honest request.
    """
    if text.count(b'"') > _MOST_QUOTES:
        raise malformed(f"the JSON has more than {_MOST_QUOTES // 2} strings")
    if text.count(b"[") + text.count(b"{") > _MOST_LISTS:
        raise malformed(
            f"the JSON has more than {_MOST_LISTS} lists; send tensors flat, or as binary data"
        )
    try:
        asked = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise malformed(f"the JSON is malformed: {error}") from error
    return _object(asked, "the request")


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise malformed(f"{what} must be a JSON object, got {short(value)}")
    return value


def _list(owner: dict[str, Any], field: str) -> list[Any]:
    value = owner.get(field)  # some clients send null for what they leave out
    if not isinstance(value, list | None):
        raise malformed(f"{field} must be a list, got {short(value)}")
    return value or []


def _parameters(owner: dict[str, Any], what: str) -> dict[str, Any]:
    """The parameters of a request or tensor; those that nobody here knows are let be."""
    given = owner.get("parameters")
    return {} if given is None else _object(given, f"parameters of {what}")


def _flag(parameters: dict[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise malformed(f"{name} must be true or false, got {short(value)}")
    return value


def _count(value: object, name: str) -> int:
    if type(value) is not int or value < 0:  # a bool is an int, and no count
        raise malformed(f"{name} must be an integer from 0, got {short(value)}")
    return value


def _id(asked: dict[str, Any]) -> str | None:
    given = asked.get("id")
    if given is not None and not isinstance(given, str):
        raise malformed(f"id must be a string, got {short(given)}")
    return given


def _timeout_ms(parameters: dict[str, Any]) -> float | None:
    """The protocol counts microseconds, and 0 is no limit."""
    if "timeout" not in parameters:
        return None
    return _count(parameters["timeout"], "timeout") / 1000 or None


def _refuse_sequences(parameters: dict[str, Any]) -> None:
    given = parameters.get("sequence_id")
    if given not in (None, 0, ""):
        raise malformed(
            f"sequence_id is {short(given)}, but detectors keep no state between requests"
        )


def _refuse_elsewhere(parameters: dict[str, Any], what: str) -> None:
    region = parameters.get("shared_memory_region")
    if region is not None:
        raise malformed(
            f"{what} is in shared memory region {short(region)},"
            " but this service reads and writes no shared memory"
        )


def _inputs(asked: dict[str, Any], behind: memoryview, signature: Signature) -> dict[str, Array]:
    specs = {spec.name: spec for spec in signature.inputs}
    found: dict[str, Array] = {}
    start = 0
    for entry in _list(asked, "inputs"):
        tensor = _object(entry, "an input")
        spec = _spec(tensor.get("name"), "input", specs)
        if spec.name in found:
            raise malformed(f"input {spec.name} is given twice")
        found[spec.name], size = _input(tensor, spec, behind[start:])
        start += size
    for spec in signature.inputs:
        if spec.name not in found and not spec.optional:
            raise malformed(f"input {spec.name} is missing; given: {short(sorted(found))}")
    if start != len(behind):
        raise malformed(
            f"{len(behind)} bytes follow the JSON, but the inputs' binary_data_size add up to"
            f" {start}"
        )
    return found


def _input(tensor: dict[str, Any], spec: TensorSpec, behind: memoryview) -> tuple[Array, int]:
    """A tensor, and how many of the bytes behind the JSON are its."""
    name = spec.name
    parameters = _parameters(tensor, f"input {name}")
    _refuse_elsewhere(parameters, f"input {name}")
    shape = read_shape(tensor.get("shape"), name)
    taken = spec.checked(tensor.get("datatype"), shape)
    data, size = tensor.get("data"), parameters.get("binary_data_size")
    if size is None:
        if data is None:
            raise malformed(f"input {name} has neither data nor binary_data_size")
        return from_json(data, spec.datatype, shape, name).reshape(taken), 0
    if data is not None:
        raise malformed(f"input {name} has both data and binary_data_size")
    size = _count(size, f"input {name}: binary_data_size")
    if size > len(behind):
        raise malformed(
            f"input {name}: binary_data_size is {size}, but only {len(behind)} bytes are left"
            " behind the JSON"
        )
    return from_binary(behind[:size], spec.datatype, shape, name).reshape(taken), size


def _spec(name: object, kind: str, specs: dict[str, TensorSpec]) -> TensorSpec:
    if not isinstance(name, str) or name not in specs:
        raise malformed(f"no {kind} {short(name)}; this model has {', '.join(specs)}")
    return specs[name]


def _outputs(
    asked: dict[str, Any], parameters: dict[str, Any], signature: Signature
) -> tuple[WantedOutput, ...]:
    binary = _flag(parameters, "binary_data_output", default=False)
    specs = {spec.name: spec for spec in signature.outputs}
    found: dict[str, WantedOutput] = {}
    for entry in _list(asked, "outputs"):
        name = _spec(_object(entry, "an output").get("name"), "output", specs).name
        if name in found:
            raise malformed(f"output {name} is asked for twice")
        own = _parameters(entry, f"output {name}")
        _refuse_elsewhere(own, f"output {name}")
        if "classification" in own:
            raise malformed(
                f"output {name}: classification is {short(own['classification'])},"
                " but these outputs are detections, which have no classification extension"
            )
        found[name] = WantedOutput(name, _flag(own, "binary_data", default=binary))
    return tuple(found.values()) or tuple(WantedOutput(name, binary) for name in specs)


def encode_answer(
    wanted: tuple[WantedOutput, ...],
    tensors: Mapping[str, Array],
    model: tuple[str, str],
    request_id: str | None,
) -> tuple[bytes, int | None]:
    """Write an answer.

    Args:
        wanted: The outputs, in the order of the answer.
        tensors: At least these, by name.
        model: The name and version of the model that answers.
        request_id: The client's; left out where None.

    Returns:
        The body, and how much of it is JSON; None where all of it is.
    """
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    for one in wanted:
        array = tensors[one.name]
        output: dict[str, Any] = {
            "name": one.name,
            "datatype": NAMES[array.dtype],
            "shape": list(array.shape),
        }
        if one.binary:
            binary.append(to_binary(array))
            output["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            output["data"] = to_json(array)
        outputs.append(output)
    named = {} if request_id is None else {"id": request_id}
    answer = {"model_name": model[0], "model_version": model[1], **named, "outputs": outputs}
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"".join([text, *binary]), len(text) if binary else None
