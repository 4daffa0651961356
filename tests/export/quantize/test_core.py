from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, parser

from export.quantize.core import cut_out, find_core, name_nodes, products_per_output

# What detectors put between and after their layers: a norm by group, regions pooled by boxes that
# were decoded half-way, a join with a constant, and scores at the end.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[1, 3, 8, 8] images, float[1, 4, 8, 8] other) => (float[1, 4, 8, 8] y, float[1, 4, 8, 8] s)
<float[4, 3, 3, 3] w1, float[4, 4, 1, 1] w2, float[4, 4, 1, 1] w3, float[4, 4, 1, 1] w4,
 float[4] one, float[4] zero, float[1] half>
{
    [first] a = Conv <pads = [1, 1, 1, 1]> (images, w1)
    [act] b = Relu (a)
    [second] c = Conv (b, w2)
    [sum] d = Add (b, c)
    [third] e = Conv (d, w3)
    [norm] f = InstanceNormalization (e, one, zero)
    [normed] g = Relu (f)
    [fourth] h = Conv (g, w4)
    [shifted] i = Add (h, half)
    [mixed] k = Add (h, other)
    [last] y = Conv (k, w2)
    [tail] l = Relu (c)
    [score] s = Sigmoid (l)
}
"""


def model() -> ModelProto:
    made = parser.parse_model(GRAPH)
    for name, shape in (("w1", [4, 3, 3, 3]), ("w2", [4, 4, 1, 1]), ("w3", [4, 4, 1, 1])):
        _fill(made.graph, name, shape)
    for name, shape in (("w4", [4, 4, 1, 1]), ("one", [4]), ("zero", [4]), ("half", [1])):
        _fill(made.graph, name, shape)
    return made


def _fill(graph: GraphProto, name: str, shape: list[int]) -> None:
    size = 1
    for side in shape:
        size *= side
    known = [tensor for tensor in graph.initializer if tensor.name == name]
    for tensor in known:
        graph.initializer.remove(tensor)
    numbers = [0.1 * (i % 7) for i in range(size)]
    graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, shape, numbers))


def names(nodes: object) -> list[str]:
    return [node.name for node in nodes]  # type: ignore[attr-defined]


def test_the_core_is_what_lies_between_layers_with_weights() -> None:
    core = find_core(model().graph)
    # Not in it: the norm and what follows it, sums with what comes from outside, and the tail.
    assert names(core.nodes) == ["first", "act", "second", "sum", "third", "fourth", "last"]
    assert names(core.first) == ["first"]
    assert names(core.last) == ["third", "fourth", "last"]
    assert core.op_types == ["Add", "Conv", "Relu"]


def test_a_product_of_two_activations_is_no_layer() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    g (float[2, 2] images) => (float[2, 2] y) { y = MatMul (images, images) }
    """
    with pytest.raises(ValueError, match="no layer with weights"):
        find_core(parser.parse_model(text).graph)


def test_the_core_of_a_real_detector(detector_path: Path) -> None:
    graph = onnx.load(detector_path).graph
    core = find_core(graph)
    layers = [node for node in graph.node if node.op_type == "Conv"]
    assert [node for node in core.nodes if node.op_type == "Conv"] == layers
    assert set(core.op_types) == {"Add", "Conv", "Relu", "Resize"}
    assert [list(node.input[:1]) for node in core.first] == [["images"]]
    assert products_per_output(core.first[0], graph) == 27
    # Classes and boxes of three levels of the pyramid.
    kinds = [node.input[1].rsplit(".", 2)[-2] for node in core.last]
    assert sorted(kinds) == ["bbox_reg"] * 3 + ["cls_logits"] * 3


def test_a_core_cut_out_takes_and_gives_what_it_shares_with_the_rest() -> None:
    whole = model()
    part = cut_out(whole, find_core(whole.graph)).graph
    assert [value.name for value in part.input] == ["images", "g", "k"]
    # `c` feeds the tail, `y` is an output of the whole.
    assert [value.name for value in part.output] == ["c", "e", "h", "y"]
    assert sorted(tensor.name for tensor in part.initializer) == ["w1", "w2", "w3", "w4"]
    assert len(whole.graph.node) == 13  # as it was


def test_nodes_get_names_of_their_own() -> None:
    graph = model().graph
    for node, name in zip(graph.node, ["same", "", "same", "Relu_1", "", "same_"], strict=False):
        node.name = name
    name_nodes(graph)
    found = names(graph.node)
    assert len(set(found)) == len(found)
    assert "" not in found
    assert found[0] == "same"
    assert found[6:] == ["normed", "fourth", "shifted", "mixed", "last", "tail", "score"]
