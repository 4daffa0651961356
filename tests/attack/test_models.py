"""Kinds 5 and 6: a model reads no file but its own, and one bad entry stops no other."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from tests.attack.core import Service, cases, run, serving, until
from tests.service.conftest import build_detector, make_card

SOON = 15  # seconds in which a folder is followed that is looked at ten times a second
GOOD = build_detector(make_card())
NAME = "hostile"
# As nobody, so that files can be forbidden to the service.
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


class Folder:
    """A folder of models and a service that follows it; started again after a failure."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp())
        self.path.chmod(0o755)
        (self.path / "good.onnx").write_bytes(GOOD)
        (self.path / "secret.bin").write_bytes(np.full(4, 0.25, np.float32).tobytes())
        self._number = 0
        self._stack = ExitStack()
        self._service: Service | None = None

    @property
    def service(self) -> Service:
        if self._service is None:
            logs = Path(tempfile.mkdtemp())
            self._stack.callback(shutil.rmtree, logs)
            prefix = NOBODY if os.getuid() == 0 else ()
            variables = {"GHM_RELOAD_SECONDS": "0.1", "GHM_LOAD_SECONDS": "4"}
            following = serving(self.path, logs, prefix=prefix, **variables)
            self._service = self._stack.enter_context(following)
        return self._service

    def stop(self) -> None:
        self._stack.close()
        self._service = None

    def models(self) -> set[str]:
        models = self.service.ask("/health/ready").json()["models"]
        return {one["name"] for one in models if one["ready"]}

    def problems(self) -> list[str]:
        return self.service.ask("/health/ready").json()["problems"]

    def is_followed(self, seconds: float = SOON) -> None:
        """A model that is added is served, and one that is removed no longer."""
        self._number += 1
        name = f"later-{self._number}"
        path = self.path / f"{name}.onnx"
        path.write_bytes(GOOD)
        until(lambda: name in self.models(), seconds)
        path.unlink()
        until(lambda: name not in self.models(), seconds)
        assert "good" in self.models()
        self.service.lives()

    def clear(self) -> None:
        for path in self.path.iterdir():
            if path.name not in ("good.onnx", "secret.bin"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
                    shutil.rmtree(path)
                else:
                    path.unlink()


@pytest.fixture(scope="module")
def kept() -> Iterator[Folder]:
    folder = Folder()
    yield folder
    folder.stop()
    shutil.rmtree(folder.path)


@pytest.fixture
def folder(kept: Folder) -> Iterator[Folder]:
    yield kept
    kept.clear()
    try:
        kept.is_followed(5)
    except (AssertionError, OSError, KeyError):  # the test has failed; the next starts anew
        kept.stop()
        kept.clear()


def outside(tensor: TensorProto, location: str = "secret.bin", **more: str) -> TensorProto:
    """Keep the data of a tensor in another file."""
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def secret(location: str = "secret.bin", **more: str) -> TensorProto:
    return outside(
        helper.make_tensor("secret", TensorProto.FLOAT, [4], [0.0] * 4), location, **more
    )


def sparse(which: str) -> SparseTensorProto:
    values = helper.make_tensor("values", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("indices", TensorProto.INT64, [2], [0, 1])
    outside({"values": values, "indices": indices}[which], length="8")
    return helper.make_sparse_tensor(values, indices, [4])


def constant(**value: object) -> NodeProto:
    return helper.make_node("Constant", [], ["unused"], **value)


def held(kind: str) -> NodeProto:
    """A constant in an attribute of a certain kind."""
    attribute = AttributeProto(name="value", type=AttributeProto.AttributeType.Value(kind))
    if kind == "TENSORS":
        attribute.tensors.append(secret())
    elif kind == "SPARSE_TENSORS":
        attribute.sparse_tensors.append(sparse("values"))
    elif kind == "FLOAT":  # says one thing and holds another
        attribute.t.CopyFrom(secret())
    node = constant()
    node.attribute.append(attribute)
    return node


def branch(*nodes: NodeProto, initializer: TensorProto | None = None) -> NodeProto:
    """An `If` whose two branches hold nodes or an initializer."""
    name = "secret" if initializer is not None else "unused"
    result = helper.make_node("Identity", [name], ["out"])
    value = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    kept = [] if initializer is None else [initializer]
    graph = helper.make_graph([*nodes, result], "branch", [], [value], kept)
    return helper.make_node("If", ["truth"], ["unused"], then_branch=graph, else_branch=graph)


def in_function(model: ModelProto, node: NodeProto, defaults: TensorProto | None = None) -> None:
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("local", "Peek", [], ["unused"], [node], opsets)
    if defaults is not None:
        function.attribute_proto.append(helper.make_attribute("value", defaults))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Peek", [], ["unused"], domain="local"))


def adds(*nodes: NodeProto, domain: str | None = None) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        model.graph.initializer.append(
            helper.make_tensor("truth", TensorProto.BOOL, [], np.array([True]))
        )
        model.graph.node.extend(nodes)
        if domain is not None:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return change


def training(model: ModelProto) -> None:
    info = model.training_info.add()
    info.initialization.initializer.append(secret())


def algorithm(model: ModelProto) -> None:
    info = model.training_info.add()
    info.algorithm.node.append(constant(value=secret()))


def replaces(name: str, **more: str) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        (tensor,) = (one for one in model.graph.initializer if one.name == name)
        outside(tensor, **more)

    return change


def undeclared(model: ModelProto) -> None:
    tensor = secret()
    tensor.data_location = TensorProto.DEFAULT
    model.graph.initializer.append(tensor)


def initializer(location: str, **more: str) -> Callable[[ModelProto], None]:
    return lambda model: model.graph.initializer.append(secret(location, **more))


READERS = {
    "initializer": replaces("bias"),
    "overridable initializer": replaces("iou_threshold"),
    "unused initializer": initializer("secret.bin"),
    "absolute path": initializer("/etc/hostname"),
    "parent folder": initializer("../../../../../etc/hostname"),
    "link": initializer("/proc/self/environ"),
    "part of a file": initializer("secret.bin", offset="4", length="8"),
    "empty location": initializer(""),
    "memory of the process": initializer("*/_ORT_MEM_ADDR_/*", offset="4096", length="16"),
    "location that is not declared": undeclared,
    "values of a sparse initializer": lambda model: model.graph.sparse_initializer.append(
        sparse("values")
    ),
    "indices of a sparse initializer": lambda model: model.graph.sparse_initializer.append(
        sparse("indices")
    ),
    "Constant": adds(constant(value=secret())),
    "values of a sparse Constant": adds(constant(sparse_value=sparse("values"))),
    "indices of a sparse Constant": adds(constant(sparse_value=sparse("indices"))),
    "tensors of an attribute": adds(held("TENSORS")),
    "sparse tensors of an attribute": adds(held("SPARSE_TENSORS")),
    "attribute that says FLOAT": adds(held("FLOAT")),
    "ConstantOfShape": adds(
        helper.make_node("ConstantOfShape", ["total_row"], ["unused"], value=secret())
    ),
    "initializer of a branch": adds(branch(initializer=secret())),
    "Constant of a branch": adds(branch(constant(value=secret()))),
    "sparse Constant of a branch": adds(branch(constant(sparse_value=sparse("values")))),
    "branch of a branch": adds(branch(branch(constant(value=secret())))),
    "function": lambda model: in_function(model, constant(value=secret())),
    "sparse Constant of a function": lambda model: in_function(
        model, constant(sparse_value=sparse("values"))
    ),
    "branch of a function": lambda model: in_function(model, branch(constant(value=secret()))),
    "default of a function": lambda model: in_function(model, constant(value_int=1), secret()),
    "initialization of a training": training,
    "algorithm of a training": algorithm,
}


def needs(model: ModelProto, *nodes: NodeProto) -> None:
    """Put nodes in front of a graph, whose result, the scalar `end`, the detections depend on."""
    model.graph.node[0].input[0] = "images_too"
    first = [
        *nodes,
        helper.make_node("Mul", ["end", "zero"], ["nothing_new"]),
        helper.make_node("Add", ["images", "nothing_new"], ["images_too"]),
    ]
    for place, node in enumerate(first):
        model.graph.node.insert(place, node)


def loop_for_ever(model: ModelProto) -> None:
    """Counts to 2^62."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Add", ["x", "x"], ["y"]),
        ],
        "body",
        [
            info("i", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("x", TensorProto.FLOAT, []),
        ],
        [info("on", TensorProto.BOOL, []), info("y", TensorProto.FLOAT, [])],
    )
    for name, kind, value in (
        ("often", TensorProto.INT64, 2**62),
        ("always", TensorProto.BOOL, 1),
    ):
        model.graph.initializer.append(helper.make_tensor(name, kind, [], [value]))
    start = helper.make_node("ReduceMax", ["images"], ["start"], keepdims=0)
    needs(model, start, helper.make_node("Loop", ["often", "always", "start"], ["end"], body=body))


def chain(number: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        names = ["zero", *(f"n{n}" for n in range(number))]
        pairs = itertools.pairwise(names)
        model.graph.node.extend(helper.make_node("Neg", [a], [b]) for a, b in pairs)

    return change


def recursive(model: ModelProto) -> None:
    in_function(model, helper.make_node("Peek", [], ["unused"], domain="local"))


def nested(depth: int) -> Callable[[ModelProto], None]:
    def change(model: ModelProto) -> None:
        node = constant(value_float=1.0)
        for _ in range(depth):
            node = branch(node)
            del node.attribute[1:]  # or every level would double
        adds(node)(model)

    return change


def sized(value: int) -> Callable[[ModelProto], None]:
    """A tensor of so many numbers, of which none is in the file."""

    def change(model: ModelProto) -> None:
        model.graph.initializer.append(helper.make_tensor("size", TensorProto.INT64, [1], [value]))
        made = helper.make_node("ConstantOfShape", ["size"], ["made"])
        needs(model, made, helper.make_node("ReduceMax", ["made"], ["end"], keepdims=0))

    return change


def versions(number: int) -> Callable[[ModelProto], None]:
    return lambda model: setattr(model.opset_import[0], "version", number)


GRAPHS = {
    "unknown domain": adds(
        helper.make_node("Peek", [], ["unused"], domain="unknown"), domain="unknown"
    ),
    "operator that nobody knows": adds(helper.make_node("Peek", [], ["unused"])),
    "function that calls itself": recursive,
    "deep branches": nested(30),
    "100,000 nodes": chain(100_000),
    "opset of the future": versions(999),
    "negative opset": versions(-1),
    "warm-up that never ends": loop_for_ever,
    "tensor beyond all memory": sized(2**60),
    "tensor of a negative size": sized(-(2**60)),
}

Card = dict


def field(*path: str | int, value: object) -> Callable[[Card], object]:
    """Replace a field of a card."""

    def change(card: Card) -> object:
        inner = card
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return card

    return change


def size(side: int) -> Callable[[Card], object]:
    def change(card: Card) -> object:
        card["preprocessing"] |= {"height": side, "width": side}
        return card

    return change


CARDS: dict[str, Callable[[Card], object]] = {
    "10^30 in a histogram": field("statistics", "positive_scores", 0, 0, value=10**30),
    "negative number in a histogram": field("statistics", "positive_scores", 0, 0, value=-1),
    "fraction in a histogram": field("statistics", "positive_scores", 0, 0, value=0.5),
    "NaN in a histogram": field("statistics", "positive_scores", 0, 0, value=float("nan")),
    "no histogram": field("statistics", "positive_scores", value=[]),
    "10^30 anchors": field("statistics", "anchors", value=10**30),
    "input of 10^9 pixels a side": size(10**9),
    "input of 10^5 pixels a side": size(10**5),
    "input of 10^6 pixels a side": size(10**6),
    "input of 10^30 pixels a side": size(10**30),
    "no pixels": size(0),
    "tiny deviation": field("preprocessing", "std", value=[1e-320] * 3),
    "endless deviation": field("preprocessing", "std", value=[1e999] * 3),
    "threshold of NaN": field("thresholds", 0, "threshold", value=float("nan")),
    "threshold of another class": field("thresholds", 0, "name", value="blue"),
    "version of the future": field("format_version", value=10**9),
    "version of text": field("format_version", value="2"),
    "unknown field": field("surprise", value=1),
    "list": lambda card: [card],
    "number": lambda _: 1,
    "null": lambda _: None,
    "depth": lambda _: json.loads("[" * 500 + "]" * 500),
}
# Odd, and perhaps allowed: the folder is followed, and no route fails.
ODD_CARDS: dict[str, Callable[[Card], object]] = {
    "10^400 steps": field("training", "steps", value=10**400),
    "seed of 10^4000": field("training", "seed", value=10**4000),
    "10^12 detections": field("max_detections", value=10**12),
    "10^30 detections": field("max_detections", value=10**30),
    "10^30 candidates": field("candidates", value=10**30),
    "threshold of text": field("thresholds", 0, "threshold", value="0.5"),
    "version that is true": field("format_version", value=True),
    "name with a slash": field("name", value="a/b"),
    "name with a line feed": field("name", value="a\nb"),
    "name of a megabyte": field("name", value="a" * 2**20),
    "data with an escape sequence": field("training", "data", value="\x1b[2J\x1b]0;x\x07"),
    "many versions": field("training", "versions", value={f"v{n}": "1" for n in range(50_000)}),
    "deep losses": field("training", "losses", value=json.loads('{"a":' * 200 + "1" + "}" * 200)),
}


def written(change: Callable[[Card], object]) -> bytes:
    model = onnx.load_model_from_string(GOOD)
    (entry,) = model.metadata_props
    card = json.loads(entry.value)
    preprocessing = card["preprocessing"]
    entry.value = json.dumps(change(card))
    if preprocessing["height"] != 64:  # the graph agrees with its card
        for dimension, side in ((2, "height"), (3, "width")):
            shape = model.graph.input[0].type.tensor_type.shape.dim[dimension]
            shape.dim_value = min(preprocessing[side], 2**63 - 1)
    return model.SerializeToString()


def graph(change: Callable[[ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(GOOD)
    change(model)
    return model.SerializeToString()


def card_text(text: bytes) -> bytes:
    """A file whose card is this text. Protobuf's own writer refuses what is not UTF-8."""
    model = onnx.load_model_from_string(GOOD)
    model.metadata_props[0].value = "#" * len(text)
    return model.SerializeToString().replace(b"#" * len(text), text)


FILES = {
    "empty": b"",
    "one byte": b"\n",
    "text": b"no model" * 1000,
    "half": GOOD[: len(GOOD) // 2],
    "without a card": graph(lambda model: model.metadata_props.pop()),
    "two cards": graph(lambda model: model.metadata_props.append(model.metadata_props[0])),
    "card that is not UTF-8": card_text(b'{"name": "\xff\xfe"}'),
    "card that is no JSON": card_text(b'{"name": '),
    "card without an end": card_text(b"[" * 100_000),
    "no graph": ModelProto(ir_version=10).SerializeToString(),
    "ZIP": b"PK\x03\x04" + bytes(1000),
    "pickle": b"\x80\x04cposix\nsystem\nX\x02\x00\x00\x00id\x85R.",
}


def refused(folder: Folder, content: bytes) -> None:
    (folder.path / f"{NAME}.onnx").write_bytes(content)
    until(lambda: any(NAME in problem for problem in folder.problems()), SOON)
    assert NAME not in folder.models()
    folder.is_followed()
    assert "root:" not in str(folder.problems())


@pytest.mark.parametrize("change", cases(5, READERS))
def test_a_model_that_reads_another_file_is_refused(folder, change):
    refused(folder, graph(change))


@pytest.mark.parametrize("change", cases(5, GRAPHS))
def test_a_graph_that_cannot_be_trusted_is_refused(folder, change):
    refused(folder, graph(change))


@pytest.mark.parametrize("change", cases(6, CARDS))
def test_a_card_that_cannot_be_is_refused(folder, change):
    refused(folder, written(change))


@pytest.mark.parametrize("content", cases(6, FILES))
def test_a_file_that_is_no_model_is_refused(folder, content):
    refused(folder, content)


@pytest.mark.parametrize("change", cases(6, ODD_CARDS))
def test_an_odd_card_breaks_no_route(folder, change):
    (folder.path / f"{NAME}.onnx").write_bytes(written(change))
    folder.is_followed()
    for path in ("/v1/models", f"/v1/models/{NAME}", f"/v2/models/{NAME}", "/metrics"):
        assert folder.service.ask(path).status in (200, 404, 503)


def forbidden(path: Path) -> None:
    path.mkdir()
    (path / "1.onnx").write_bytes(GOOD)
    path.chmod(0)


def unreadable(path: Path) -> None:
    path.write_bytes(GOOD)
    path.chmod(0)


def linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def twice(path: Path) -> None:
    path.with_suffix("").mkdir()
    for other in (path.with_suffix("") / "1.onnx", path):
        other.write_bytes(GOOD)


ENTRIES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "lost+found": ("lost+found", forbidden),
    "unreadable folder": ("backup", forbidden),
    "unreadable file": (f"{NAME}.onnx", unreadable),
    "folder with the name of a file": (f"{NAME}.onnx", Path.mkdir),
    "pipe": (f"{NAME}.onnx", os.mkfifo),
    "link to nothing": (f"{NAME}.onnx", linked("nothing")),
    "link to itself": (f"{NAME}.onnx", linked(f"{NAME}.onnx")),
    "link to a device": (f"{NAME}.onnx", linked("/dev/zero")),
    "link to the folder itself": (NAME, linked(".")),
    "brackets in a name": (f"{NAME} (1).onnx", lambda path: path.write_bytes(GOOD)),
    "name of dots": ("...onnx", lambda path: path.write_bytes(GOOD)),
    "name of escapes": (f"{NAME}\x1b[2J.onnx", lambda path: path.write_bytes(GOOD)),
    "name with a line feed": (f"{NAME}\n.onnx", lambda path: path.write_bytes(GOOD)),
    "name that is not UTF-8": (f"{NAME}\udcff.onnx", lambda path: path.write_bytes(GOOD)),
    "name of other letters": ("модель.onnx", lambda path: path.write_bytes(GOOD)),
    "long name": ("n" * 240 + ".onnx", lambda path: path.write_bytes(GOOD)),
    "same version twice": (f"{NAME}.onnx", twice),
    "folders in folders": (
        "a",
        lambda path: (path / "b" / "c" / "d").mkdir(parents=True),
    ),
}


@pytest.mark.parametrize(("name", "make"), cases(6, ENTRIES))
def test_an_odd_entry_stops_no_other(folder, name, make):
    make(folder.path / name)
    folder.is_followed()
    assert "good" in folder.models()


def test_a_permission_that_is_set_right_is_noticed(folder):
    path = folder.path / f"{NAME}.onnx"
    unreadable(path)
    until(lambda: any(NAME in problem for problem in folder.problems()), SOON)
    path.chmod(0o644)
    until(lambda: NAME in folder.models(), SOON)


def test_a_folder_of_bad_entries_and_a_good_one_starts(folder):
    """All of them at once, and before the service listens."""
    folder.stop()
    for index, (name, make) in enumerate(ENTRIES.values()):
        if make is not twice and not name.startswith(NAME):
            make(folder.path / name)
        elif make is not twice:
            make(folder.path / name.replace(NAME, f"{NAME}{index}"))
    bad = [written(change) for change in CARDS.values()] + list(FILES.values())
    bad += [graph(change) for change in READERS.values()]
    for index, content in enumerate(bad):
        (folder.path / f"bad{index}.onnx").write_bytes(content)
    assert folder.service.port
    assert "good" in folder.models()
    assert not {name for name in folder.models() if name.startswith("bad")}


def test_inspection_of_a_hostile_file_is_one_sentence(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(graph(READERS["sparse Constant of a branch"]))
    done = run("inspect", path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
