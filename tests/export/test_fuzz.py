"""Damaged, foreign and malicious files: each is read, or refused in a sentence.

Sealed files are damaged as disks and networks damage them. Files without a seal, as other tools
write them, are damaged in ways that get past it, and whatever is read is served.
"""

import contextlib
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.card import CARD_KEY, CardError, DetectorCard
from export.file import DetectorFile, detector_bytes, read_detector
from export.inspect import describe
from service.engine.session import ModelError, ServedModel

# Damaged files of each of eight kinds.
FILES = pytest.mark.parametrize("files", [40, pytest.param(400, marks=pytest.mark.slow)])
MEMORY = 200 * 2**20  # bytes that reading a thousand files of 3 kB may leave the process larger by
Rng = np.random.Generator
Damage = Callable[[bytes, Rng], bytes]


@pytest.fixture
def sealed(small_model, small_card):
    return detector_bytes(small_model, small_card)


@pytest.fixture
def unsealed(small_model):
    content: bytes = small_model.SerializeToString()
    return content


def cut(content: bytes, rng: Rng) -> bytes:
    return content[: rng.integers(len(content))]


def flip(content: bytes, rng: Rng) -> bytes:
    changed = np.frombuffer(content, np.uint8).copy()
    for place in rng.integers(len(changed), size=rng.integers(1, 9)):
        changed[place] ^= 1 << rng.integers(8)
    return changed.tobytes()


def splice(content: bytes, rng: Rng) -> bytes:
    """Bytes left out, doubled, moved over others, or put in from nowhere."""
    a, b, c = (int(x) for x in np.sort(rng.integers(len(content), size=3)))
    kinds = (
        content[:a] + content[b:],
        content[:b] + content[a:b] + content[b:],
        content[:a] + content[b:c] + content[a + c - b :],
        content[:a] + rng.bytes(rng.integers(1, 40)) + content[a:],
    )
    return kinds[rng.integers(len(kinds))]


WRONG = [
    *(
        None,
        True,
        False,
        -1,
        0,
        3,
        2**53 + 1,
        2**63,
        10**6,
        10**9,
        10**30,
        -(10**30),
        0.1,
        -0.5,
        1.5,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "0", "\ud800", "\n", "0" * 64, [], {}, [[]], {"": None}, [1, 2, 3], ["dog"]),
    *([0.0, 1.0, float("nan")], "a" * 2000, "\x1b[31m\u202e", [[10**30]], [{"": [[]]}] * 3),
]


def spoil_card(content: bytes, rng: Rng) -> bytes:
    """A field of another type or range; one missing; one too many."""
    model = onnx.load_model_from_string(content)
    card = json.loads(model.metadata_props[0].value)
    for _ in range(rng.integers(1, 3)):
        place: Any = card
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = keys[rng.integers(len(keys))]
            if not isinstance(place[key], (dict, list)) or rng.random() < 0.3:
                act = rng.integers(6)
                if act == 0:
                    del place[key]
                elif act == 1 and isinstance(place, dict):
                    place[f"{key}_"] = 1
                else:
                    place[key] = WRONG[rng.integers(len(WRONG))]
                break
            place = place[key]
    text = json.dumps(card)
    helper.set_model_props(model, {CARD_KEY: text})
    return model.SerializeToString()


def tensor(model: ModelProto, rng: Rng) -> TensorProto:
    tensors = model.graph.initializer
    return tensors[rng.integers(len(tensors))]


def node(model: ModelProto, rng: Rng) -> onnx.NodeProto:
    return model.graph.node[rng.integers(len(model.graph.node))]


def value(model: ModelProto, rng: Rng) -> onnx.ValueInfoProto:
    values = [*model.graph.input, *model.graph.output]
    return values[rng.integers(len(values))]


def cycle(model: ModelProto, rng: Rng) -> None:
    one = node(model, rng)
    one.input[0] = one.output[0]


def external(model: ModelProto, rng: Rng) -> None:
    one = tensor(model, rng)
    one.data_location = TensorProto.EXTERNAL
    one.external_data.add(key="location", value="/etc/passwd")


def external_in_an_attribute(model: ModelProto, rng: Rng) -> None:
    far = TensorProto(name="far", data_type=TensorProto.FLOAT, dims=[1], data_location=1)
    far.external_data.add(key="location", value="/etc/passwd")
    made = node(model, rng).attribute.add(name=str(rng.choice(["value", "sparse_value", "x"])))
    sparse = onnx.SparseTensorProto(values=far, dims=[1])
    (made.t, made.tensors.add(), made.sparse_tensor.values, made.sparse_tensors.add().values)[
        rng.integers(4)
    ].CopyFrom(far)
    model.functions.add(name="f").attribute_proto.add(name="y").sparse_tensor.CopyFrom(sparse)


def many_nodes(model: ModelProto, rng: Rng) -> None:
    one = node(model, rng)
    model.graph.node.extend([one] * int(rng.choice([100, 30_000])))


def many_calls(model: ModelProto, rng: Rng) -> None:
    levels = int(rng.choice([3, 40, 1000]))
    for level in range(levels):
        calls = [helper.make_node(f"f{level + 1}", [], [], domain="deep")] * 2
        body = calls if level < levels - 1 else []
        model.functions.append(helper.make_function("deep", f"f{level}", [], [], body, []))
    model.graph.node.append(helper.make_node("f0", [], [], domain="deep"))


def nested(model: ModelProto, rng: Rng) -> None:
    graph = helper.make_graph([], "leaf", [], [])
    for _ in range(rng.integers(1, 28)):  # protobuf builds no more
        graph = helper.make_graph(
            [helper.make_node("If", ["stands"], ["x"], then_branch=graph)], "in", [], []
        )
    model.graph.node.append(helper.make_node("If", ["stands"], ["y"], then_branch=graph))


def recursive(model: ModelProto, rng: Rng) -> None:
    call = helper.make_node("again", ["x"], ["y"], domain="here")
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("here", 1)]
    model.functions.append(helper.make_function("here", "again", ["x"], ["y"], [call], opset))
    model.opset_import.add(domain="here", version=1)
    model.graph.node.append(helper.make_node("again", ["half"], ["z"], domain="here"))


SIZES = [-1, 0, 1, 2, 7, 2**31, 2**40, 2**62]
STRUCTURE: list[Callable[[ModelProto, Rng], object]] = [
    cycle,
    external,
    external_in_an_attribute,
    many_nodes,
    many_calls,
    nested,
    recursive,
    lambda m, r: setattr(m, "ir_version", int(r.choice([*SIZES, 11, 13, 99]))),
    lambda m, r: setattr(m.opset_import[0], "version", int(r.choice([*SIZES, 1, 9, 17, 26, 99]))),
    lambda m, _: setattr(m.opset_import[0], "domain", "ai.onnx.ml"),
    lambda m, _: m.opset_import.append(m.opset_import[0]),
    lambda m, _: m.ClearField("opset_import"),
    lambda m, r: setattr(node(m, r), "op_type", str(r.choice(["", "Nothing", "Conv", "Loop"]))),
    lambda m, r: setattr(node(m, r), "domain", "com.example"),
    lambda m, r: m.graph.node.append(node(m, r)),
    lambda m, r: m.graph.node.remove(node(m, r)),
    lambda m, r: node(m, r).ClearField("input"),
    lambda m, r: node(m, r).input.append("nowhere"),
    lambda m, r: m.graph.output.append(m.graph.output[r.integers(4)]),
    lambda m, r: m.graph.input.append(m.graph.input[r.integers(3)]),
    lambda m, r: m.graph.initializer.append(tensor(m, r)),
    lambda m, r: m.graph.initializer.remove(tensor(m, r)),
    lambda m, r: tensor(m, r).dims.append(int(r.choice(SIZES))),
    lambda m, r: tensor(m, r).dims.__setitem__(0, int(r.choice(SIZES))),
    lambda m, r: setattr(tensor(m, r), "data_type", int(r.integers(0, 40))),
    lambda m, r: setattr(tensor(m, r), "raw_data", r.bytes(r.integers(0, 20))),
    lambda m, r: tensor(m, r).float_data.append(float(r.choice([np.nan, np.inf, -1, 0.5]))),
    lambda m, r: tensor(m, r).segment.CopyFrom(TensorProto.Segment(begin=5, end=2)),
    lambda m, r: setattr(value(m, r).type.tensor_type, "elem_type", int(r.integers(0, 40))),
    lambda m, r: value(m, r).type.tensor_type.shape.dim.add(dim_value=int(r.choice(SIZES))),
    lambda m, r: value(m, r).type.sequence_type.elem_type.SetInParent(),
    lambda m, r: value(m, r).ClearField("type"),
    lambda m, r: setattr(value(m, r), "name", str(r.choice(["", "scores", "half", "images"]))),
    lambda m, _: m.metadata_props.append(m.metadata_props[0]),
    lambda m, r: setattr(m.metadata_props[0], "value", "[" * int(r.choice([1, 900, 100_000]))),
]


def restructure(content: bytes, rng: Rng) -> bytes:
    model = onnx.load_model_from_string(content)
    for _ in range(rng.integers(1, 3)):
        with contextlib.suppress(IndexError):  # of what the first edit removed
            STRUCTURE[rng.integers(len(STRUCTURE))](model, rng)
    return model.SerializeToString()


def read_or_refuse(path: Path, content: bytes, refusals: list[str]) -> DetectorFile | None:
    path.write_bytes(content)
    try:
        file = read_detector(path)
    except CardError as error:
        refusals.append(str(error))
        return None
    finally:
        assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refusals[-1:])
    assert file.content == content
    assert DetectorCard.from_json(file.card.to_json()) == file.card
    graph = onnx.load_model_from_string(content).graph
    defaults = {one.name: one for one in graph.initializer}
    for name, wanted in (
        ("class_thresholds", file.card.class_thresholds),
        ("iou_threshold", [file.card.iou_threshold]),
    ):
        assert numpy_helper.to_array(defaults[name]).tolist() == wanted
    return file


@FILES
@pytest.mark.parametrize("damage", [cut, flip, splice])
def test_a_sealed_file_is_read_only_if_what_was_sealed_is_whole(sealed, tmp_path, damage, files):
    rng, refusals = np.random.default_rng(1), []
    body = sealed[:-120]
    for _ in range(files):
        content = damage(sealed, rng)
        file = read_or_refuse(tmp_path / "x.onnx", content, refusals)
        assert file is None or content.startswith(body)
    assert len(refusals) > 0.9 * files


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """One flipped bit of a shape in the graph is enough to ask for gigabytes."""
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def serve(file: DetectorFile) -> None:
    """It answers, or raises ModelError; nothing else may come out."""
    with contextlib.suppress(ModelError), little_memory():
        ServedModel(file, provider="cpu").warm_up()


@FILES
@pytest.mark.parametrize("damage", [cut, flip, splice, spoil_card, restructure])
def test_an_unsealed_file_is_refused_or_served_as_its_card_says(unsealed, tmp_path, damage, files):
    rng, refusals, read = np.random.default_rng(2), [], 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(files):
        file = read_or_refuse(tmp_path / "x.onnx", damage(unsealed, rng), refusals)
        if file is not None:
            read += 1
            assert describe(file)
            serve(file)
    assert len(refusals) > 0.1 * files
    # The card comes last, so no cut leaves one, and a splice hardly ever.
    assert read > 0 or damage in (cut, splice)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY


def test_the_undamaged_file_is_read_and_served(sealed, unsealed, tmp_path):
    for content in (sealed, unsealed):
        file = read_or_refuse(tmp_path / "x.onnx", content, [])
        assert file is not None
        model = ServedModel(file, provider="cpu")
        (found,) = model.detect(np.zeros((1, 3, 8, 16), np.float32))
        assert (found.scores.tolist(), found.labels.tolist()) == ([0.5], [1])


@pytest.mark.parametrize("version", [3, 99, 10**30])
def test_a_newer_card_says_upgrade(unsealed, tmp_path, version):
    model = onnx.load_model_from_string(unsealed)
    card = {"format_version": version, "a field of the future": {}}
    helper.set_model_props(model, {CARD_KEY: json.dumps(card)})
    refusals: list[str] = []
    assert read_or_refuse(tmp_path / "x.onnx", model.SerializeToString(), refusals) is None
    assert f"format_version {version}; this package reads up to 2. Upgrade" in refusals[0]


def test_a_graph_within_graphs_without_end_is_refused(unsealed, tmp_path):
    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            size, length = size >> 7, length + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(5000):
        graph = field(1, field(5, field(6, graph)))  # node, attribute, graph
    refusals: list[str] = []
    assert read_or_refuse(tmp_path / "x.onnx", unsealed + field(7, graph), refusals) is None
    assert refusals[0].endswith("not an ONNX file, or cut short")
