"""The core of a detector's graph: the layers with weights, and the nodes between them.

The core does almost all of a detector's arithmetic and tolerates low precision; decoding, score
comparison and NMS do not. It is found by following the graph, so that one rule serves RetinaNet,
FCOS (with group norms outside) and Faster R-CNN (with proposals outside, half-way through).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, helper, shape_inference

from export.card import INPUT

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Operators that may stand between two layers of the core, by the inputs that are activations.
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
        first: The layers with weights that read the image.
        last: The layers with weights whose results leave the core: predictors of classes and boxes.
    """

    nodes: tuple[NodeProto, ...]
    first: tuple[NodeProto, ...]
    last: tuple[NodeProto, ...]

    @property
    def op_types(self) -> list[str]:
        """The operators in it, sorted."""
        return sorted({node.op_type for node in self.nodes})


def find_core(graph: GraphProto) -> Core:
    """Find the layers with weights, and the nodes all of whose paths lie between such layers.

    Raises:
        ValueError: There is no layer with weights.
    """
    constant = {tensor.name for tensor in graph.initializer}
    reached: list[tuple[NodeProto, list[str]]] = []  # with the activations it reads
    made: set[str] = set()
    for node in graph.node:
        if _weighted(node, constant):
            reached.append((node, list(node.input[:1])))
        elif (joined := _joined(node)) and made.issuperset(joined):
            reached.append((node, joined))
        else:
            continue
        made.update(node.output)
    nodes: list[NodeProto] = []
    read: set[str] = set()
    for node, activations in reversed(reached):
        if _weighted(node, constant) or not read.isdisjoint(node.output):
            nodes.insert(0, node)
            read.update(activations)
    layers = [node for node in nodes if _weighted(node, constant)]
    if not layers:
        raise ValueError("the graph has no layer with weights; there is nothing to make smaller")
    return Core(
        nodes=tuple(nodes),
        first=tuple(node for node in layers if node.input[0] == INPUT),
        last=tuple(node for node in layers if read.isdisjoint(node.output)),
    )


def _weighted(node: NodeProto, constant: set[str]) -> bool:
    return node.op_type in WEIGHTED and node.input[1] in constant


def _joined(node: NodeProto) -> list[str]:
    if node.op_type in JOINS_MANY:
        return list(node.input)
    return list(node.input[:1]) if node.op_type in JOINS_ONE else []


def products_per_output(node: NodeProto, graph: GraphProto) -> int:
    """Number of products that a convolution sums for one element of its result."""
    weight = next(tensor for tensor in graph.initializer if tensor.name == node.input[1])
    return prod(weight.dims[1:])


def name_nodes(graph: GraphProto) -> None:
    """Give every node a unique name, by which onnxruntime's tools identify nodes."""
    taken: set[str] = set()
    for number, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{number}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)


def cut_out(model: ModelProto, core: Core) -> ModelProto:
    """Return the core as a model of the activations it reads, and of those read outside."""
    graph = shape_inference.infer_shapes(model).graph
    inside = {node.name for node in core.nodes}
    constant = {tensor.name: tensor for tensor in graph.initializer}
    made = list(dict.fromkeys(name for node in core.nodes for name in node.output))
    read = list(dict.fromkeys(name for node in core.nodes for name in node.input if name))
    outside = [node for node in graph.node if node.name not in inside]
    read_outside = {name for node in outside for name in node.input}
    read_outside |= {value.name for value in graph.output}
    infos = {value.name: value for value in [*graph.value_info, *graph.input, *graph.output]}
    part = helper.make_graph(
        core.nodes,
        "core",
        [infos[name] for name in read if name not in constant and name not in made],
        [infos[name] for name in made if name in read_outside],
        [constant[name] for name in read if name in constant],
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)
