"""Bounds on ONNX files that are not trusted, and the rule that a file refers to nothing outside it.

Checked as soon as a file is parsed, before anything that is recursive, or slower than linear in the
graph, runs on it: onnx's checker, and onnxruntime's optimizations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from math import prod
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from export.card import CardError

# A protobuf message cannot be larger, so a larger file is no ONNX file in one piece.
MAX_FILE_BYTES = 2**31 - 1
MAX_NODES = 20_000  # in all graphs, with functions written out; onnxruntime loads them in seconds
MAX_NESTING = 8  # graphs within one another
MAX_FIELDS = 1_000_000  # of all messages in the file, each of which takes memory once parsed
MAX_DENSE = 2**26  # elements of a sparse tensor, which onnxruntime writes out

# Others need operators that are registered in the process, or are onnxruntime's own.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})
FILE_READERS = frozenset({"EPContext"})  # operators that name a file to load

_VARINT, _FIXED_64, _LENGTH, _FIXED_32 = 0, 1, 2, 5  # wire types of protobuf
_ELEMENTS = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}
_PLAIN = ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT32", "INT64", "BOOL")
_ITEM_BYTES = {
    kind: onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    for kind in map(TensorProto.DataType.Value, _PLAIN)
}


_Key = tuple[str, str, str]  # domain, name and overload of a function


class _Part(NamedTuple):
    message: Message
    depth: int  # of graphs around it
    node: NodeProto | None  # the nearest around it
    function: _Key | None  # the function around it


def parse_model(content: bytes) -> ModelProto:
    """Parse an ONNX file and check it with `check_model`.

    Raises:
        CardError: It is not ONNX, or is refused.
    """
    _count_fields(content)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise CardError("not an ONNX file, or cut short") from error
    # Protobuf reads many texts as an empty message with unknown fields.
    if model.ir_version <= 0 or not model.graph.node:
        raise CardError("not an ONNX file: it holds no graph")
    check_model(model)
    return model


def _count_fields(content: bytes) -> None:
    """Refuse a file of more than `MAX_FIELDS` fields, before they are parsed.

    A message of two bytes becomes an object of 80; parsing a file of 20 MB could take 1.6 GB.
    """
    count, stack = 0, [(0, len(content), ModelProto.DESCRIPTOR)]
    while stack:
        place, end, kind = stack.pop()
        while place < end:
            count += 1
            if count > MAX_FIELDS:
                raise CardError(f"the file has more than {MAX_FIELDS:,} fields")
            try:
                tag, place = _varint(content, place)
                length = {_FIXED_32: 4, _FIXED_64: 8}.get(tag & 7, 0)
                if tag & 7 in (_VARINT, _LENGTH):
                    length, place = _varint(content, place)
            except IndexError:
                return  # cut short, as the parser will find
            if tag & 7 == _LENGTH:
                field = kind.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    stack.append((place, min(place + length, end), field.message_type))
            place += length if tag & 7 != _VARINT else 0


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := content[place]) > 127:
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
        if shift > 63:
            raise CardError("not an ONNX file, or cut short")
    return value | byte << shift, place + 1


def check_model(model: ModelProto) -> None:
    """Refuse a model beyond the bounds, or one that refers to anything outside its file.

    Raises:
        CardError: The message names the tensor or node.
    """
    functions = {(f.domain, f.name, f.overload) for f in model.functions}
    # Nodes and calls of the graph (None) and of each function.
    nodes: Counter[_Key | None] = Counter()
    calls: dict[_Key | None, Counter[_Key]] = {key: Counter() for key in (None, *functions)}
    for message, depth, node, function in _parts(model):
        if depth > MAX_NESTING:
            raise CardError(f"graphs lie in one another more than {MAX_NESTING} deep")
        if isinstance(message, (GraphProto, FunctionProto)) and len(message.node) > MAX_NODES:
            raise CardError(f"a graph has more than {MAX_NODES:,} nodes")
        if isinstance(message, TensorProto):
            _check_tensor(message, node)
        elif isinstance(message, SparseTensorProto):
            _check_sparse(message, node)
        elif isinstance(message, NodeProto):
            nodes[function] += 1
            called = (message.domain, message.op_type, message.overload)
            if called in functions:
                calls[function][called] += 1
            elif message.domain not in DOMAINS:
                raise CardError(f"{_label(message)} is of an unknown domain, {message.domain!r}")
            if message.op_type in FILE_READERS:
                raise CardError(f"{_label(message)} loads another file")
    size = _written_out(nodes, calls)
    if size > MAX_NODES:
        raise CardError(f"the graph has more than {MAX_NODES:,} nodes with functions written out")


def _written_out(nodes: Counter[_Key | None], calls: dict[_Key | None, Counter[_Key]]) -> int:
    """Count nodes as if functions were written out where they are called, as onnxruntime does."""
    sizes: dict[_Key | None, int] = {}
    try:
        for key in TopologicalSorter(calls).static_order():
            inside = sum(sizes[called] * times for called, times in calls[key].items())
            sizes[key] = min(nodes[key] + inside, MAX_NODES + 1)
    except CycleError as error:
        raise CardError(f"function {error.args[1][0][1]!r} calls itself") from error
    return sizes[None]


def _tensor_fields() -> dict[str, frozenset[str]]:
    """The fields of each message that lead to tensors, as the installed onnx defines them."""
    types, unseen = {}, [ModelProto.DESCRIPTOR]
    while unseen:
        one = unseen.pop()
        if one.full_name not in types:
            types[one.full_name] = one
            unseen += [field.message_type for field in one.fields if field.message_type]
    fields: dict[str, frozenset[str]] = {TensorProto.DESCRIPTOR.full_name: frozenset()}
    grown = True
    while grown:
        grown = False
        for name, one in types.items():
            leading = (f for f in one.fields if f.message_type)
            found = frozenset(f.name for f in leading if f.message_type.full_name in fields)
            if found - fields.get(name, frozenset()):
                fields[name], grown = found, True
    return fields


_TENSOR_FIELDS = _tensor_fields()


def _parts(model: ModelProto) -> Iterator[_Part]:
    """Iterate over all messages that are or may hold tensors, wherever they lie; no recursion."""
    stack = [_Part(model, 0, None, None)]
    while stack:
        yield (part := stack.pop())
        message, depth, node, function = part
        if isinstance(message, GraphProto):
            depth += 1
        elif isinstance(message, NodeProto):
            node = message
        elif isinstance(message, FunctionProto):
            function = (message.domain, message.name, message.overload)
        leading = _TENSOR_FIELDS[message.DESCRIPTOR.full_name]
        for field, value in message.ListFields():
            if field.name in leading:
                inner = [value] if isinstance(value, Message) else value
                stack += [_Part(each, depth, node, function) for each in inner]


def _check_tensor(tensor: TensorProto, node: NodeProto | None) -> None:
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise CardError(
            f"{_name(tensor, node)} is kept in another file; a detector carries its weights"
        )
    if tensor.data_type not in _ELEMENTS:
        raise CardError(f"{_name(tensor, node)} is {element_name(tensor.data_type)}")
    size = _ITEM_BYTES.get(tensor.data_type)
    if min(tensor.dims, default=0) < 0 or (
        size and tensor.raw_data and len(tensor.raw_data) != size * prod(tensor.dims)
    ):
        raise CardError(
            f"{_name(tensor, node)} is damaged: {len(tensor.raw_data)} bytes for"
            f" {element_name(tensor.data_type)} {list(tensor.dims)}"
        )


def _check_sparse(sparse: SparseTensorProto, node: NodeProto | None) -> None:
    if min(sparse.dims, default=0) < 0 or prod(sparse.dims) > MAX_DENSE:
        raise CardError(
            f"sparse {_name(sparse.values, node)} has {list(sparse.dims)} elements;"
            f" at most {MAX_DENSE:,} are read"
        )


def _name(tensor: TensorProto, node: NodeProto | None) -> str:
    return f"tensor {tensor.name!r}" + (f" of {_label(node)}" if node is not None else "")


def _label(node: NodeProto) -> str:
    return f"node {node.name!r} ({node.op_type})"


def element_name(data_type: int) -> str:
    """Name an element type; one that is unknown too."""
    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(data_type))
    except (KeyError, ValueError):
        return f"of unknown type {data_type}"
