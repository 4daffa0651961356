"""The core of a detector's graph: the layers with weights, and what joins them.

Almost all of a detector's arithmetic is there, and it stands being rough. Decoding boxes, comparing
scores and suppressing overlaps are none of it. The core is found by following the graph, whatever
the detector: so one rule serves RetinaNet, FCOS (whose group norms stay outside) and Faster R-CNN
(whose proposals are decoded, suppressed and pooled outside, half-way through).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, shape_inference

from export.card import INPUT

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What may stand between two layers of the core, and where its activations come in.
JOINS_ONE = frozenset(
    {"AveragePool", "Clip", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Relu"}
    | {"Reshape", "Resize", "Transpose"}
)
JOINS_MANY = frozenset({"Add", "Concat"})


@dataclass(frozen=True)
class Core:
    """Nodes of a graph, in its order.

    Attributes:
        nodes: All of the core.
        first: Those with weights that see the image itself.
        last: Those with weights whose results leave the core: what they say of classes and boxes.
    """

    nodes: tuple[NodeProto, ...]
    first: tuple[NodeProto, ...]
    last: tuple[NodeProto, ...]

    @property
    def op_types(self) -> list[str]:
        """The operators in it, sorted."""
        return sorted({node.op_type for node in self.nodes})


def find_core(graph: GraphProto) -> Core:
    """Find the layers with weights, and the nodes all of whose ways lie between such layers.

    Raises:
        ValueError: There is no layer with weights.
    """
    constant = {tensor.name for tensor in graph.initializer}
    inside: list[NodeProto] = []
    made: set[str] = set()
    for node in graph.node:
        weighted = _weighted(node, constant)
        if weighted or ((activations := _joined(node)) and made.issuperset(activations)):
            inside.append(node)
            made.update(node.output)
    nodes: list[NodeProto] = []
    wanted: set[str] = set()
    for node in reversed(inside):
        weighted = _weighted(node, constant)
        if weighted or not wanted.isdisjoint(node.output):
            nodes.insert(0, node)
            wanted.update(node.input[:1] if weighted else _joined(node))
    layers = [node for node in nodes if _weighted(node, constant)]
    if not layers:
        raise ValueError("the graph has no layer with weights; there is nothing to make smaller")
    return Core(
        nodes=tuple(nodes),
        first=tuple(node for node in layers if node.input[0] == INPUT),
        last=tuple(node for node in layers if wanted.isdisjoint(node.output)),
    )


def _weighted(node: NodeProto, constant: set[str]) -> bool:
    return node.op_type in WEIGHTED and node.input[1] in constant


def _joined(node: NodeProto) -> list[str]:
    """The activations that a node joins; none if it is not of the kind."""
    if node.op_type in JOINS_MANY:
        return list(node.input)
    return list(node.input[:1]) if node.op_type in JOINS_ONE else []


def products_an_output(node: NodeProto, graph: GraphProto) -> int:
    """Products that a convolution sums for one number of its result."""
    weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    return prod(weight.dims[1:])


def name_nodes(graph: GraphProto) -> None:
    """Give every node a name of its own; the tools that change graphs go by names."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


def cut_out(model: ModelProto, core: Core) -> ModelProto:
    """The core as a model of its own.

    Its inputs are the activations that it takes from outside, its outputs those that the outside
    takes from it.
    """
    graph = shape_inference.infer_shapes(model).graph
    own = {node.name for node in core.nodes}
    rest = [node for node in graph.node if node.name not in own]
    constant = {tensor.name: tensor for tensor in graph.initializer}
    made = {name for node in core.nodes for name in node.output}
    read = dict.fromkeys(name for node in core.nodes for name in node.input if name)
    used_outside = {name for node in rest for name in node.input}
    used_outside |= {value.name for value in graph.output}
    infos = {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}
    part = helper.make_graph(
        core.nodes,
        "core",
        _described([name for name in read if name not in made | constant.keys()], infos),
        _described([name for name in dict.fromkeys(_outputs(core)) if name in used_outside], infos),
        [constant[name] for name in read if name in constant],
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


def _outputs(core: Core) -> Iterable[str]:
    return (name for node in core.nodes for name in node.output)


def _described(names: Iterable[str], infos: dict[str, ValueInfoProto]) -> list[ValueInfoProto]:
    return [infos[name] for name in names]
