"""Letterbox and normalisation inside the graph, for images `uint8 [B, H, W, 3]` of any size.

The nodes in front of a detector's graph compute what the card's `preprocessing` describes and the
service does on the host: Pillow's antialiased triangle filter, along each row and then each column,
in fixed-point arithmetic, so that grey levels equal Pillow's. Pillow 13 takes the columns of tall
images first; there, levels differ by at most 1. `Resize` is not used: some runtimes ignore its
`antialias`.

A runtime without float64, such as OpenVINO, may resize an image one pixel wider or narrower when
its scaled side is half-way between two pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.card import FORMAT_VERSION, INPUT, OUTPUTS, DetectorCard, Preprocessing

BOXES = OUTPUTS[0]
PREFIX = "uint8/"  # of the names of all added nodes
PREPARED, FRAMED = f"{PREFIX}prepared", f"{PREFIX}framed"
# Neighbouring output pixels share one window of input pixels. In larger blocks, more zeros are
# multiplied; in smaller ones, more pixels are copied.
MOST_IN_BLOCK = 8
DIGIT = 2**11  # Pillow's weights have two such digits behind the point


def accept_uint8(model: ModelProto, card: DetectorCard) -> tuple[ModelProto, DetectorCard]:
    """Put the preparation of images into a detector's graph.

    The new graph takes `images` uint8 `[B, height, width, 3]`, RGB, of any size (one size per
    call), and returns `boxes` in pixels of those images, clipped to them. Everything else stays.

    Args:
        model: A graph with `images` float32 `[B, 3, H, W]`; it is not changed.
        card: Its card.

    Returns:
        The new graph, and the card of its file.

    Raises:
        ValueError: The detector takes uint8 images already.
    """
    if card.input == "uint8":
        raise ValueError(f"{card.name} takes uint8 images already")
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    _rename(graph, {INPUT: PREPARED, BOXES: FRAMED})
    before, after = Operators(), Operators("boxes/")
    height, width = _sides(before, card.preprocessing)
    _prepare(before, card.preprocessing, height, width)
    _scale_boxes(after, height, width)
    nodes = [*before.nodes, *graph.node, *after.nodes]
    graph.ClearField("node")
    graph.node.extend(nodes)
    sizes: list[str | int | None] = ["batch", "height", "width", 3]
    for value in graph.input:
        if value.name == PREPARED:
            value.CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, sizes))
    for value in graph.output:
        if value.name == FRAMED:
            value.name = BOXES
    changes = {"input": "uint8", "format_version": FORMAT_VERSION}
    return made, DetectorCard.model_validate({**card.model_dump(), **changes})


class Operators:
    """Nodes of a graph: `ops.Add(a, b)` appends one and returns the name of its output.

    Inputs are names, or constants: numbers (int64 or float32) and arrays.
    """

    def __init__(self, part: str = "") -> None:
        self.nodes: list[NodeProto] = []
        self._prefix = PREFIX + part

    def __getattr__(self, op_type: str) -> Callable[..., str]:
        return partial(self._append, op_type)

    def _append(self, op_type: str, *inputs: Any, output: str = "", **attributes: Any) -> str:
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        output = output or f"{self._prefix}{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, names, [output], name=output, **attributes))
        return output

    def _constant(self, value: Any) -> str:
        kind = np.float32 if type(value) is float else None  # numpy scalars keep their type
        return self.Constant(value=numpy_helper.from_array(np.asarray(value, dtype=kind)))


@dataclass(frozen=True)
class Side:
    """One side of the images, in pixels; names of int64 scalars.

    Attributes:
        size: Of the original images.
        resized: Within the network's frame.
        frame: The frame itself.
    """

    size: str
    resized: str
    frame: int


def _sides(ops: Operators, frame: Preprocessing) -> tuple[Side, Side]:
    """Height and width: in float64, as the service computes them."""
    sizes = [ops.Squeeze(ops.Shape(INPUT, start=axis, end=axis + 1)) for axis in (1, 2)]
    exact = [ops.Cast(size, to=TensorProto.DOUBLE) for size in sizes]
    frames = (frame.height, frame.width)
    scale = ops.Min(
        *(ops.Div(np.float64(to), size) for to, size in zip(frames, exact, strict=True))
    )
    resized = [ops.Cast(ops.Round(ops.Mul(size, scale)), to=TensorProto.INT64) for size in exact]
    height, width = (
        Side(size, ops.Max(after, 1), to)
        for size, after, to in zip(sizes, resized, frames, strict=True)
    )
    return height, width


def _prepare(ops: Operators, frame: Preprocessing, height: Side, width: Side) -> None:
    """From `images` to `PREPARED`."""
    # [B, width, 3 * height] is resized along its second axis, then [B, height, 3 * W].
    columns = ops.Reshape(ops.Transpose(INPUT, perm=[0, 2, 3, 1]), np.array([0, 0, -1]))
    wide = ops.Reshape(_resize(ops, columns, width), np.array([0, width.frame, 3, -1]))
    rows = ops.Reshape(ops.Transpose(wide, perm=[0, 3, 2, 1]), np.array([0, 0, 3 * width.frame]))
    shape = np.array([0, height.frame, 3, width.frame])
    levels = ops.Transpose(ops.Reshape(_resize(ops, rows, height), shape), perm=[0, 2, 1, 3])
    inside = ops.And(
        ops.Less(np.arange(height.frame)[:, None], height.resized),
        ops.Less(np.arange(width.frame), width.resized),
    )
    grey = ops.Cast(levels, to=TensorProto.FLOAT)
    padded = ops.Where(inside, grey, float(frame.pad_value))
    mean, std = (np.array(x, np.float32).reshape(3, 1, 1) for x in (frame.mean, frame.std))
    ops.Div(ops.Sub(ops.Div(padded, 255.0), mean), std, output=PREPARED)


def _resize(ops: Operators, source: str, side: Side) -> str:
    """Resize `[B, n, m]` along its second axis to `r` pixels of a frame.

    Output pixel `o` is a weighted sum over a window of input pixels. It weighs input pixel `x` by
    a triangle as wide as the larger of both sizes, `max(0, 2 max(n, r) - |(2x + 1) r -
    (2o + 1) n|)`: an integer, to be divided by the sum of its row. Output pixels are computed in
    blocks, and the window of a block starts at the first pixel that its first output pixel weighs.

    Returns:
        uint8 `[B, blocks, pixels per block, m]`.
    """
    size, resized, frame = side.size, side.resized, side.frame
    block = max(d for d in range(1, MOST_IN_BLOCK + 1) if frame % d == 0)
    twice = ops.Add(resized, resized)
    larger = ops.Max(size, resized)
    reach = ops.Add(larger, larger)
    firsts = 2 * np.arange(0, frame, block)[:, None] + 1
    start = ops.Div(ops.Max(ops.Sub(ops.Mul(firsts, size), reach), 0), twice)
    span = ops.Add(ops.Mul(ops.Add(size, size), block - 1), ops.Add(reach, reach))
    count = ops.Add(ops.Div(span, twice), 2)
    taps = ops.Add(start, ops.Range(0, count, 1))
    index = ops.Min(taps, ops.Sub(size, 1))

    columns = ops.Unsqueeze(taps, np.array([1]))
    tap_centres = ops.Mul(ops.Add(ops.Add(columns, columns), 1), resized)
    output_centres = ops.Mul(2 * np.arange(frame).reshape(-1, block, 1) + 1, size)
    distance = ops.Abs(ops.Sub(tap_centres, output_centres))
    triangle = ops.Max(ops.Sub(reach, distance), 0)
    inside = ops.Unsqueeze(ops.Equal(taps, index), np.array([1]))
    return _weighted_sum(ops, ops.Where(inside, triangle, 0), ops.Gather(source, index, axis=1))


def _weighted_sum(ops: Operators, shares: str, windows: str) -> str:
    """Sum windows by integer shares, rounded as Pillow does: weights have 22 binary digits.

    The product of 11 of these digits with the 8 of a pixel sums up exactly in float32 (over 32
    taps and more), and in the shorter floats that GPUs multiply in.
    """
    row = ops.Max(ops.ReduceSum(shares, np.array([2]), keepdims=1), 1)
    shifted = ops.Mul(shares, DIGIT)
    coarse = ops.Div(shifted, row)
    rest = ops.Cast(ops.Sub(shifted, ops.Mul(coarse, row)), to=TensorProto.DOUBLE)
    quotient = ops.Div(rest, ops.Cast(row, to=TensorProto.DOUBLE))
    fine = ops.Floor(ops.Add(ops.Mul(quotient, np.float64(DIGIT)), np.float64(0.5)))
    pixels = ops.Cast(windows, to=TensorProto.FLOAT)
    coarse_sum, fine_sum = (
        ops.MatMul(ops.Mul(ops.Cast(part, to=TensorProto.FLOAT), 1 / DIGIT**digit), pixels)
        for part, digit in ((coarse, 1), (fine, 2))
    )
    whole = ops.Floor(coarse_sum)
    carried = ops.Floor(ops.Add(ops.Sub(coarse_sum, whole), ops.Add(fine_sum, 0.5)))
    return ops.Cast(ops.Add(whole, carried), to=TensorProto.UINT8)


def _scale_boxes(ops: Operators, height: Side, width: Side) -> None:
    """From `FRAMED`, boxes in the network's frame, to `BOXES` in pixels of the images."""
    one = np.array([1])
    limits, factors = [], []
    for side in (width, height):
        size = ops.Cast(side.size, to=TensorProto.FLOAT)
        limits.append(ops.Reshape(size, one))
        factor = ops.Div(size, ops.Cast(side.resized, to=TensorProto.FLOAT))
        factors.append(ops.Reshape(factor, one))
    grown = ops.Mul(FRAMED, ops.Concat(*factors * 2, axis=0))
    ops.Min(grown, ops.Concat(*limits * 2, axis=0), output=BOXES)


def _rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Rename values wherever a graph, or a graph inside its nodes, mentions them."""
    for value in chain(graph.input, graph.output, graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (*attribute.graphs, attribute.g):
                _rename(inner, names)
