"""Reading and writing of `detector.onnx`, with checks of its digest, card and graph.

Needs onnx and numpy, never torch. Reading executes nothing. Writing refuses every file that reading
would refuse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import (
    GraphProto,
    ModelProto,
    TensorProto,
    ValueInfoProto,
    numpy_helper,
)

from export.bounds import MAX_FILE_BYTES, check_model, element_name, parse_model
from export.card import (
    CARD_KEY,
    INPUT,
    IOU_INPUT,
    OUTPUTS,
    THRESHOLDS_INPUT,
    CardError,
    DetectorCard,
)
from ghm_triton.atomic import write_atomically

# The digest of a file's bytes is onnx metadata at the very end of the file, so runtimes ignore it.
# The IR version is repeated after it, as protobuf allows; no other tool writes a file that ends
# so. A tool that rewrites the file moves both, and its change is not taken for damage.
SEAL_KEY = "ghm.sha256"
_DIGEST_DIGITS = 64

_OUTPUT_TYPES = {
    "boxes": (TensorProto.FLOAT, 3),
    "scores": (TensorProto.FLOAT, 2),
    "labels": (TensorProto.INT64, 2),
    "num_detections": (TensorProto.INT64, 1),
}


@dataclass(frozen=True)
class DetectorFile:
    """A detector's file that passed all checks.

    Attributes:
        path: The file's path.
        card: Its card.
        sha256: The digest of its bytes, 64 hexadecimal digits.
        content: Its bytes, so that a runtime loads exactly the bytes that were checked.
    """

    path: Path
    card: DetectorCard
    sha256: str
    content: bytes = field(repr=False, compare=False)


def read_detector(path: str | Path) -> DetectorFile:
    """Read a detector's file and check it against the contract.

    Args:
        path: A `.onnx` file as `ghm export` writes it.

    Returns:
        The file's card, digest and bytes.

    Raises:
        CardError: The file is damaged, is not ONNX, has no card or one that this version cannot
            read, lacks an input, initializer or output of the contract, keeps data outside itself,
            is beyond the bounds of `export.bounds`, or has thresholds in its graph that differ
            from those in its card. The message starts with the path.
        OSError: The file cannot be read.

    Example:
        ```python
        card = read_detector("detector.onnx").card
        print(dict(zip(card.class_names, card.class_thresholds, strict=True)))
        ```
    """
    path = Path(path)
    try:
        content = read_content(path)
        if is_broken(content):
            raise CardError("damaged: its bytes are not those whose digest it carries")
        model = parse_model(content)
        card = _card(model)
        _check_graph(model.graph, card)
    except CardError as error:
        raise CardError(f"{path}: {error}") from error
    return DetectorFile(path, card, hashlib.sha256(content).hexdigest(), content)


def write_detector(path: str | Path, model: ModelProto, card: DetectorCard) -> None:
    """Write a graph with its card as one file, after every check.

    The same graph and card give the same bytes. An existing file is replaced once the new one is
    complete.

    Args:
        path: The `.onnx` file to write; its folder is created if it is missing.
        model: The graph with its weights; a card in it is replaced.
        card: The card.

    Raises:
        CardError: The graph contradicts the card, or `read_detector` would refuse the file.
        ValueError: onnx's checker or its strict shape inference refuses the graph.
        OSError: The file cannot be written.
    """
    path, content = Path(path), detector_bytes(model, card)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def detector_bytes(model: ModelProto, card: DetectorCard) -> bytes:
    """Return the bytes that `write_detector` writes; raises the same errors."""
    written = ModelProto()
    written.CopyFrom(model)
    others = [entry for entry in model.metadata_props if entry.key not in (CARD_KEY, SEAL_KEY)]
    del written.metadata_props[:]
    written.metadata_props.extend(others)
    written.metadata_props.add(key=CARD_KEY, value=card.to_json())
    _check(written)
    return seal(written.SerializeToString(deterministic=True), written.ir_version)


def refuse_output(path: Path, **sources: Path) -> None:
    """Raise ValueError for an output that is a folder or one of the named `sources`."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as detector.onnx")
    for kind, source in sources.items():
        if path.exists() and path.samefile(source):
            raise ValueError(f"{path} is the {kind}; it would be overwritten")


def set_default(model: ModelProto, name: str, values: Sequence[float]) -> None:
    """Replace the values of a float32 initializer, such as `class_thresholds`."""
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(values, dtype=np.float32), name))


def _check(model: ModelProto) -> None:
    check_model(model)
    _check_graph(model.graph, _card(model))
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"not a valid ONNX graph: {error}") from error


def read_content(path: Path) -> bytes:
    """Return the bytes of a file that may be ONNX; raises CardError if it cannot be."""
    if path.exists() and not path.is_file():
        raise CardError("not a file")
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if not content:
        raise CardError("the file is empty")
    if len(content) > MAX_FILE_BYTES:
        raise CardError("larger than 2 GiB, which no ONNX file in one piece is")
    return content


def _card(model: ModelProto) -> DetectorCard:
    cards = [entry.value for entry in model.metadata_props if entry.key == CARD_KEY]
    if not cards:
        raise CardError(
            f"no card: the metadata has no {CARD_KEY!r}. A file that `ghm export` wrote has one"
        )
    if len(cards) > 1:
        raise CardError(f"{len(cards)} cards in the metadata; there must be one")
    return DetectorCard.from_json(cards[0])


def _check_graph(graph: GraphProto, card: DetectorCard) -> None:
    _check_image_input(graph, card)
    _check_outputs(graph)
    thresholds = _overridable(graph, THRESHOLDS_INPUT, len(card.class_names))
    iou = _overridable(graph, IOU_INPUT, 1)
    card.check_initializers([float(value) for value in thresholds], float(iou[0]))


def _check_image_input(graph: GraphProto, card: DetectorCard) -> None:
    initialized = {tensor.name for tensor in graph.initializer}
    required = {value.name: value for value in graph.input if value.name not in initialized}
    if list(required) != [INPUT]:
        raise CardError(f"the graph's inputs are {_names(required)}; there must be one, {INPUT!r}")
    height, width = card.preprocessing.height, card.preprocessing.width
    element, shape, text = {
        "float32": (
            TensorProto.FLOAT,
            [None, 3, height, width],
            f"float32 [batch, 3, {height}, {width}] with a batch of any size",
        ),
        "uint8": (
            TensorProto.UINT8,
            [None, None, None, 3],
            "uint8 [batch, height, width, 3] with images of any size",
        ),
    }[card.input]
    images = required[INPUT]
    if images.type.tensor_type.elem_type != element or _shape(images) != shape:
        raise CardError(f"input {INPUT!r} is {_describe(images)}, not {text}")


def _check_outputs(graph: GraphProto) -> None:
    outputs = {value.name: value for value in graph.output}
    for name in OUTPUTS:
        if name not in outputs:
            raise CardError(f"the graph has no output {name!r}; it has {_names(outputs)}")
        (element, rank), output = _OUTPUT_TYPES[name], outputs[name]
        shape = _shape(output)
        right_type = output.type.tensor_type.elem_type == element
        if not right_type or (shape is not None and len(shape) != rank):
            raise CardError(
                f"output {name!r} is {_describe(output)},"
                f" not {element_name(element)} of {rank} dimension{'s' if rank > 1 else ''}"
            )


def _overridable(graph: GraphProto, name: str, length: int) -> npt.NDArray[np.float32]:
    tensors = [tensor for tensor in graph.initializer if tensor.name == name]
    if len(tensors) != 1:
        raise CardError(f"the graph has {len(tensors)} initializers {name!r}; there must be one")
    if name not in {value.name for value in graph.input}:
        raise CardError(f"{name!r} is no input of the graph, so no request could override it")
    tensor = tensors[0]
    if tensor.data_type != TensorProto.FLOAT or list(tensor.dims) != [length]:
        raise CardError(
            f"initializer {name!r} is {element_name(tensor.data_type)} {list(tensor.dims)},"
            f" not float32 [{length}]"
        )
    try:
        values = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise CardError(f"initializer {name!r} is damaged: {error}") from error
    return np.asarray(values, dtype=np.float32)


def _names(values: Iterable[object]) -> list[str]:
    """Sorted names. Protobuf returns one that is not UTF-8 as bytes."""
    return sorted(map(str, values))


def _shape(value: ValueInfoProto) -> list[int | None] | None:
    """Dimensions, None for one of any size; None if the file has no shape."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def _describe(value: ValueInfoProto) -> str:
    element = element_name(value.type.tensor_type.elem_type)
    shape = _shape(value)
    if shape is None:
        return f"{element} of no stated shape"
    return f"{element} [{', '.join('any' if dim is None else str(dim) for dim in shape)}]"


def seal(content: bytes, ir_version: int) -> bytes:
    """Append the digest of a serialized model, whose IR version is below 128."""
    return content + _tail(hashlib.sha256(content).hexdigest(), ir_version)


def is_broken(content: bytes) -> bool:
    """Whether a file ends in a digest of other bytes; False for a file without a digest."""
    length = len(_tail("0" * _DIGEST_DIGITS, 1))
    body, tail = content[:-length], content[-length:]
    try:
        digest = tail[-2 - _DIGEST_DIGITS : -2].decode("ascii")
        sealed = tail == _tail(digest, tail[-1])
    except (IndexError, ValueError):
        return False
    return sealed and hashlib.sha256(body).hexdigest() != digest


def _tail(digest: str, ir_version: int) -> bytes:
    entry, again = ModelProto(), ModelProto(ir_version=ir_version)
    entry.metadata_props.add(key=SEAL_KEY, value=digest)
    tail: bytes = entry.SerializeToString() + again.SerializeToString()
    return tail
