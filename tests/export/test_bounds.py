"""Files that reach outside themselves or are too large to be served, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import AttributeProto, ModelProto, SparseTensorProto, TensorProto, helper

from export import bounds
from export.attach.attach import attach
from export.bounds import check_model, parse_model
from export.card import CardError
from export.file import read_detector, write_detector

SECRET = np.array([3.0, 1.0, 4.0, 1.0], np.float32)


def far(name: str = "far") -> TensorProto:
    """A tensor whose values are those of a file beside the model's."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "secret", "offset": "0", "length": "16"}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def far_sparse() -> SparseTensorProto:
    indices = helper.make_tensor("places", TensorProto.INT64, [4], [0, 1, 2, 3])
    return SparseTensorProto(values=far(), indices=indices, dims=[4])


def model_of(nodes: str, more: str = "") -> ModelProto:
    return onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 18, "here": 1]>
        g (float[4] x, bool c) => (float[4] y) {{ {nodes} }} {more}""")


def node(model: ModelProto) -> onnx.NodeProto:
    return model.graph.node[0]


def in_initializer(model: ModelProto) -> None:
    model.graph.initializer.append(far("w"))


def in_sparse_initializer(model: ModelProto) -> None:
    sparse = far_sparse()
    sparse.values.name = "w"
    model.graph.sparse_initializer.append(sparse)


def attribute(name: str, value: Any) -> Callable[[ModelProto], None]:
    def add(model: ModelProto) -> None:
        node(model).attribute.append(helper.make_attribute(name, value))

    return add


def without_a_type(model: ModelProto) -> None:
    node(model).attribute.add(name="value").t.CopyFrom(far())


def beside_another_value(model: ModelProto) -> None:
    made = node(model).attribute.add(name="value_float", type=AttributeProto.FLOAT, f=1.0)
    made.t.CopyFrom(far())


def in_branch(model: ModelProto) -> None:
    for each in node(model).attribute:
        each.g.initializer.append(far("w"))


def in_constant_of_branch(model: ModelProto) -> None:
    for each in node(model).attribute:
        each.g.node[0].attribute.append(helper.make_attribute("sparse_value", far_sparse()))


def in_function(model: ModelProto) -> None:
    model.functions[0].node[0].attribute.append(helper.make_attribute("value", far()))


def in_default_of_function(model: ModelProto) -> None:
    model.functions[0].attribute_proto.append(helper.make_attribute("given", far()))
    reference = model.functions[0].node[0].attribute.add(name="value", type=AttributeProto.TENSOR)
    reference.ref_attr_name = "given"


def in_training(model: ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(far())


ADD, CONSTANT = "y = Max (w, x)", "w = Constant () y = Max (w, x)"
BRANCH = (
    "y = If (c) <then_branch = a () => (float[4] p) {{ {0} p = Max (w, x) }},"
    " else_branch = b () => (float[4] q) {{ {0} q = Max (w, x) }}>"
)
CALL = "y = here.f ()"
FUNCTION = '<domain: "here", opset_import: ["": 18]> f () => (p) { p = Constant () }'
PLACES: list[tuple[str, str, str, Callable[[ModelProto], None]]] = [
    ("initializer", ADD, "", in_initializer),
    ("sparse initializer", ADD, "", in_sparse_initializer),
    ("value", CONSTANT, "", attribute("value", far())),
    ("sparse value", CONSTANT, "", attribute("sparse_value", far_sparse())),
    ("tensors", CONSTANT, "", attribute("more", [far()])),
    ("sparse tensors", CONSTANT, "", attribute("more", [far_sparse()])),
    ("value without a type", CONSTANT, "", without_a_type),
    ("value beside another", CONSTANT, "", beside_another_value),
    ("initializer of a branch", BRANCH.format(""), "", in_branch),
    ("constant of a branch", BRANCH.format("w = Constant ()"), "", in_constant_of_branch),
    ("function", CALL, FUNCTION, in_function),
    ("default of a function", CALL, FUNCTION, in_default_of_function),
    ("training", "y = Identity (x)", "", in_training),
]
# Where onnxruntime 1.31 refuses the graph, or does not look.
UNREAD = {"tensors", "sparse tensors", "value without a type", "value beside another", "training"}


@pytest.mark.parametrize(("place", "nodes", "more", "edit"), PLACES, ids=[p[0] for p in PLACES])
def test_tensors_in_other_files_are_refused_wherever_onnxruntime_would_read_them(
    tmp_path, monkeypatch, place, nodes, more, edit
):
    monkeypatch.chdir(tmp_path)
    SECRET.tofile("secret")
    model = model_of(nodes, more)
    edit(model)
    with pytest.raises(CardError, match=r"tensor '(w|far)'.* is kept in another file"):
        check_model(model)
    feeds = {"x": np.zeros(4, np.float32), "c": np.array(True)}
    if place in UNREAD:
        return
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    used = {value.name for value in session.get_inputs()}
    (answer,) = session.run(["y"], {name: feeds[name] for name in used})
    assert np.array_equal(answer, SECRET)


def chain(length: int) -> ModelProto:
    nodes = [helper.make_node("Relu", [f"v{i}"], [f"v{i + 1}"]) for i in range(length)]
    return helper.make_model(helper.make_graph(nodes, "g", [], []))


def wide(inputs: int) -> ModelProto:
    node = helper.make_node("Sum", ["x"] * inputs, ["y"])
    return helper.make_model(helper.make_graph([node], "g", [], []))


def nested(depth: int) -> ModelProto:
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [])
    for _ in range(depth - 1):
        node = helper.make_node("If", ["c"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [])
    return helper.make_model(graph)


def doubling(levels: int) -> ModelProto:
    """Functions of which each calls the next twice."""
    model = chain(1)
    for level in range(levels):
        called = [helper.make_node(f"f{level + 1}", [], [], domain="here")] * 2
        body = called if level < levels - 1 else [helper.make_node("Relu", ["x"], ["y"])]
        model.functions.append(helper.make_function("here", f"f{level}", [], [], body, []))
    model.graph.node.append(helper.make_node("f0", [], [], domain="here"))
    return model


def recursive() -> ModelProto:
    model = doubling(2)
    model.functions[1].node.append(model.graph.node[-1])
    return model


def sparse(side: int) -> ModelProto:
    model = chain(1)
    values = helper.make_tensor("thin", TensorProto.FLOAT, [0], [])
    model.graph.sparse_initializer.add(dims=[side, side]).values.CopyFrom(values)
    return model


def of_domain(domain: str, op_type: str = "Relu") -> ModelProto:
    model = chain(1)
    model.graph.node[0].domain, model.graph.node[0].op_type = domain, op_type
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chain(bounds.MAX_NODES + 1), "more than 20,000 nodes"),
        (wide(bounds.MAX_FIELDS + 1), "more than 1,000,000 fields"),
        (nested(bounds.MAX_NESTING + 1), "more than 8 deep"),
        (doubling(16), "more than 20,000 nodes with functions written out"),
        (doubling(2000), "more than 20,000 nodes"),
        (recursive(), "function 'f[01]' calls itself"),
        (sparse(10**5), r"sparse tensor 'thin' has \[100000, 100000\] elements"),
        (of_domain("com.example"), r"node '' \(Relu\) is of an unknown domain, 'com.example'"),
        (of_domain("com.microsoft", "EPContext"), "loads another file"),
    ],
    ids=["nodes", "inputs", "depth", "calls", "many calls", "recursion", "sparse", "domain", "op"],
)
def test_models_beyond_the_bounds_are_refused(tmp_path, model, message):
    path, card = tmp_path / "x.onnx", tmp_path / "card.json"
    path.write_bytes(model.SerializeToString())
    facts = {"name": "x", "class_names": ["a"], "thresholds": 0.5, "size": [8, 8]}
    card.write_text(json.dumps(facts))
    for use in (
        lambda: read_detector(path),
        lambda: attach(path, card, tmp_path / "out.onnx"),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_model_beyond_the_bounds_is_not_written(tmp_path, small_model, small_card):
    small_model.graph.node[0].domain = "com.example"
    with pytest.raises(CardError, match="unknown domain"):
        write_detector(tmp_path / "x.onnx", small_model, small_card)


def test_millions_of_empty_messages_are_refused_before_they_are_parsed(monkeypatch):
    monkeypatch.setattr(onnx, "load_model_from_string", lambda _: pytest.fail("parsed"))
    nodes = b"\x0a\x00" * bounds.MAX_FIELDS
    length = bytes([128 | len(nodes) >> shift & 127 for shift in (0, 7, 14)] + [len(nodes) >> 21])
    with pytest.raises(CardError, match="more than 1,000,000 fields"):
        parse_model(b"\x08\x0a\x3a" + length + nodes)


@pytest.mark.parametrize(
    "model",
    [
        chain(bounds.MAX_NODES),
        nested(bounds.MAX_NESTING),
        doubling(12),
        sparse(2**13),
        of_domain("ai.onnx"),
        of_domain("com.microsoft"),
    ],
    ids=["nodes", "depth", "calls", "sparse", "ai.onnx", "com.microsoft"],
)
def test_models_within_the_bounds_are_not(model):
    parse_model(model.SerializeToString())
