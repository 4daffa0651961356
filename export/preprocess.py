"""Images as they are, `uint8 [B, H, W, 3]`: letterbox and normalisation inside the graph.

What is put before a detector's graph computes what the card's `preprocessing` says and the service
does on the host: the triangle filter, antialiased, along each row and then each column, in Pillow's
fixed-point arithmetic. So the grey levels are Pillow's. Where Pillow 13 takes the columns first, as
it does for tall images, they are within one of them. It is written in operators that every runtime
computes alike. `Resize` is not one of them: some ignore its `antialias`.

A runtime without float64, such as OpenVINO, may resize an image one pixel wider or narrower when
its scaled side lies half-way between two pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, parser

from export.card import FORMAT_VERSION, INPUT, DetectorCard, Preprocessing

BOXES = "boxes"
PREPARED, FRAMED = "prepared", "framed"
PREFIX = "uint8/"  # of every name that is added
# Neighbouring output pixels share one window of input pixels. Where more share it, more zeros are
# multiplied; where fewer do, more pixels are copied.
MOST_IN_BLOCK = 8
FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE
DIGIT = 2**11  # Pillow's weights have two such digits behind the point


def accept_uint8(model: ModelProto, card: DetectorCard) -> tuple[ModelProto, DetectorCard]:
    """Put the preparation of images into a detector's graph.

    The new graph takes `images` uint8 `[B, height, width, 3]`, RGB, of any size (one size a call),
    and answers with `boxes` in pixels of those images, clipped to them. All else is as it was.

    Args:
        model: A graph whose `images` are float32 `[B, 3, H, W]`; it is not changed.
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
    _rename(graph, {INPUT: PREFIX + PREPARED, BOXES: PREFIX + FRAMED})
    core = list(graph.node)
    graph.ClearField("node")
    graph.node.extend([*_preparation(card.preprocessing), *core, *_return_of_boxes()])
    _describe(graph)
    changes = {"input": "uint8", "format_version": FORMAT_VERSION}
    return made, DetectorCard.model_validate({**card.model_dump(), **changes})


def _describe(graph: GraphProto) -> None:
    """Say what the new graph takes and gives, in the places of what the old one did."""
    sizes: list[str | int | None] = ["batch", "height", "width", 3]
    for value in graph.input:
        if value.name == PREFIX + PREPARED:
            value.CopyFrom(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, sizes))
    for value in graph.output:
        if value.name == PREFIX + FRAMED:
            value.name = BOXES


def _preparation(frame: Preprocessing) -> list[NodeProto]:
    """From `images` to `prepared`; the sizes stay behind for `_return_of_boxes`."""
    height, width = frame.height, frame.width
    return _nodes(
        f"""
        {_CONSTANTS}
        {_sizes(height, width)}
        # [B, width, 3 * height] is resized along its second axis, then [B, height, 3 * W].
        columns = Transpose <perm = [0, 2, 3, 1]> (images)
        flat_last = Constant <value_ints = [0, 0, -1]> ()
        flat_columns = Reshape (columns, flat_last)
        {_resize("x", "flat_columns", "width", width)}
        by_column = Constant <value_ints = [0, {width}, 3, -1]> ()
        wide = Reshape (x_resized, by_column)
        rows = Transpose <perm = [0, 3, 2, 1]> (wide)
        flat_rows_shape = Constant <value_ints = [0, 0, {3 * width}]> ()
        flat_rows = Reshape (rows, flat_rows_shape)
        {_resize("y", "flat_rows", "height", height)}
        by_row = Constant <value_ints = [0, {height}, 3, {width}]> ()
        tall = Reshape (y_resized, by_row)
        levels = Transpose <perm = [0, 2, 1, 3]> (tall)
        {_pad_and_normalise(frame)}
        """
    )


_CONSTANTS = f"""
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        two = Constant <value_int = 2> ()
        half = Constant <value_float = 0.5> ()
        second_axis = Constant <value_ints = [1]> ()
        third_axis = Constant <value_ints = [2]> ()
        digit = Constant <value_int = {DIGIT}> ()
        real_digit = Constant <value = double {{{DIGIT}}}> ()
        real_half = Constant <value = double {{0.5}}> ()
        first_place = Constant <value_float = {1 / DIGIT}> ()
        second_place = Constant <value_float = {1 / DIGIT**2}> ()
"""


def _sizes(height: int, width: int) -> str:
    """The size of the images, and the one in the frame: in float64, as the service computes it."""
    return f"""
        height_row = Shape <start = 1, end = 2> (images)
        width_row = Shape <start = 2, end = 3> (images)
        height = Squeeze (height_row)
        width = Squeeze (width_row)
        frame_height = Constant <value = double {{{height}}}> ()
        frame_width = Constant <value = double {{{width}}}> ()
        real_height = Cast <to = {DOUBLE}> (height)
        real_width = Cast <to = {DOUBLE}> (width)
        height_scale = Div (frame_height, real_height)
        width_scale = Div (frame_width, real_width)
        scale = Min (width_scale, height_scale)
        scaled_height = Mul (real_height, scale)
        scaled_width = Mul (real_width, scale)
        rounded_height = Round (scaled_height)
        rounded_width = Round (scaled_width)
        whole_height = Cast <to = {TensorProto.INT64}> (rounded_height)
        whole_width = Cast <to = {TensorProto.INT64}> (rounded_width)
        resized_height = Max (whole_height, one)
        resized_width = Max (whole_width, one)
    """


def _resize(axis: str, source: str, side: str, frame: int) -> str:
    """Resize `[B, n, m]` along its second axis, to the `r` of `frame` pixels that an image takes.

    Output pixel `o` is a sum over a window of input pixels, each with its share of a triangle:
    see `_shares` for the windows and `_sums` for the sum.
    """
    size = max(d for d in range(1, MOST_IN_BLOCK + 1) if frame % d == 0)
    text = _shares(side, frame, size) + _sums(source)
    return text.replace("@", f"{axis}_")


def _shares(side: str, frame: int, size: int) -> str:
    """The window of every block, `index` `[blocks, taps]`, and `share` `[blocks, size, taps]`.

    Output pixel `o` weighs input pixel `x` by a triangle as wide as the larger of both,
    `max(0, 2 max(n, r) - |(2x + 1) r - (2o + 1) n|)`: an integer, to be divided by the sum of its
    row. The first output pixel of a block has the first tap of its window.
    """
    blocks = frame // size
    return f"""
        @n = Add ({side}, {side})
        @r = Add (resized_{side}, resized_{side})
        @larger = Max ({side}, resized_{side})
        @reach = Add (@larger, @larger)
        @first = Constant <value = int64[{blocks}, 1] {{{_odd(range(0, frame, size))}}}> ()
        @first_centre = Mul (@first, {side})
        @first_reached = Sub (@first_centre, @reach)
        @first_inside = Max (@first_reached, zero)
        @start = Div (@first_inside, @r)
        @steps = Constant <value_int = {size - 1}> ()
        @span = Mul (@n, @steps)
        @span_left = Add (@span, @reach)
        @span_both = Add (@span_left, @reach)
        @whole_span = Div (@span_both, @r)
        @count = Add (@whole_span, two)
        @from_start = Range (zero, @count, one)
        @tap = Add (@start, @from_start)
        @last = Sub ({side}, one)
        @index = Min (@tap, @last)
        @inside = Equal (@tap, @index)

        @taps = Unsqueeze (@tap, second_axis)
        @even = Add (@taps, @taps)
        @odd = Add (@even, one)
        @tap_centre = Mul (@odd, resized_{side})
        @outputs = Constant <value = int64[{blocks}, {size}, 1] {{{_odd(range(frame))}}}> ()
        @output_centre = Mul (@outputs, {side})
        @offset = Sub (@tap_centre, @output_centre)
        @distance = Abs (@offset)
        @slope = Sub (@reach, @distance)
        @triangle = Max (@slope, zero)
        @counted = Unsqueeze (@inside, second_axis)
        @share = Where (@counted, @triangle, zero)
    """


def _sums(source: str) -> str:
    """Weigh and sum the windows; Pillow rounds its weights to 22 binary digits, and so do we.

    Eleven digits at a time, times the eight of a pixel, sum up exactly in float32 (over 32 taps
    and more), and in the shorter floats that GPUs multiply in.
    """
    return f"""
        @total = ReduceSum <keepdims = 1> (@share, third_axis)
        @row = Max (@total, one)
        @shifted = Mul (@share, digit)
        @coarse = Div (@shifted, @row)
        @taken = Mul (@coarse, @row)
        @rest = Sub (@shifted, @taken)
        @real_rest = Cast <to = {DOUBLE}> (@rest)
        @real_row = Cast <to = {DOUBLE}> (@row)
        @quotient = Div (@real_rest, @real_row)
        @exact_fine = Mul (@quotient, real_digit)
        @raised_fine = Add (@exact_fine, real_half)
        @fine = Floor (@raised_fine)
        @real_coarse = Cast <to = {FLOAT}> (@coarse)
        @real_fine = Cast <to = {FLOAT}> (@fine)
        @coarse_weights = Mul (@real_coarse, first_place)
        @fine_weights = Mul (@real_fine, second_place)

        @windows = Gather <axis = 1> ({source}, @index)
        @pixels = Cast <to = {FLOAT}> (@windows)
        @coarse_sum = MatMul (@coarse_weights, @pixels)
        @fine_sum = MatMul (@fine_weights, @pixels)
        @coarse_level = Floor (@coarse_sum)
        @remainder = Sub (@coarse_sum, @coarse_level)
        @raised = Add (@fine_sum, half)
        @fine_level = Add (@remainder, @raised)
        @carried = Floor (@fine_level)
        @level = Add (@coarse_level, @carried)
        @resized = Cast <to = {TensorProto.UINT8}> (@level)
    """


def _pad_and_normalise(frame: Preprocessing) -> str:
    """From `levels` to `prepared`: what the image does not reach is padding."""
    height, width = frame.height, frame.width
    return f"""
        every_row = Constant <value = int64[{height}, 1] {{{_numbers(range(height))}}}> ()
        every_column = Constant <value = int64[{width}] {{{_numbers(range(width))}}}> ()
        row_inside = Less (every_row, resized_height)
        column_inside = Less (every_column, resized_width)
        inside = And (row_inside, column_inside)
        padding = Constant <value_float = {float(frame.pad_value)}> ()
        grey = Cast <to = {FLOAT}> (levels)
        padded = Where (inside, grey, padding)
        white = Constant <value_float = 255.0> ()
        mean = Constant <value = float[3, 1, 1] {{{_numbers(frame.mean)}}}> ()
        std = Constant <value = float[3, 1, 1] {{{_numbers(frame.std)}}}> ()
        light = Div (padded, white)
        centred = Sub (light, mean)
        {PREPARED} = Div (centred, std)
    """


def _return_of_boxes() -> list[NodeProto]:
    """From `framed`, boxes in the network's frame, to `boxes` in pixels of the images."""
    return _nodes(
        f"""
        one_row = Constant <value_ints = [1]> ()
        image_height = Cast <to = {FLOAT}> (height)
        image_width = Cast <to = {FLOAT}> (width)
        framed_height = Cast <to = {FLOAT}> (resized_height)
        framed_width = Cast <to = {FLOAT}> (resized_width)
        y_factor = Div (image_height, framed_height)
        x_factor = Div (image_width, framed_width)
        x_factors = Reshape (x_factor, one_row)
        y_factors = Reshape (y_factor, one_row)
        factors = Concat <axis = 0> (x_factors, y_factors, x_factors, y_factors)
        x_limit = Reshape (image_width, one_row)
        y_limit = Reshape (image_height, one_row)
        limits = Concat <axis = 0> (x_limit, y_limit, x_limit, y_limit)
        grown = Mul ({FRAMED}, factors)
        {BOXES} = Min (grown, limits)
        """
    )


def _nodes(text: str) -> list[NodeProto]:
    """Nodes from ONNX's textual form, every name but `images` and `boxes` with the prefix."""
    graph: GraphProto = parser.parse_graph(f"g () => () {{ {text} }}")
    names = {name for node in graph.node for name in chain(node.input, node.output)}
    _rename(graph, {name: PREFIX + name for name in names - {INPUT, BOXES}})
    for node in graph.node:
        node.name = node.output[0]
    return list(graph.node)


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


def _odd(numbers: range) -> str:
    return _numbers(2 * number + 1 for number in numbers)


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(map(str, values))
