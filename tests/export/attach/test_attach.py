from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image
from starlette.testclient import TestClient

from export.attach.attach import attach
from export.attach.outputs import AttachError, OutputLayout, join_outputs
from export.card import CARD_KEY, IOU_INPUT, THRESHOLDS_INPUT
from export.file import SEAL_KEY, read_detector
from export.runtimes import RUNTIMES, OnnxRuntime
from export.thresholds import rewrite_thresholds
from ghm_triton.cli import main
from service.app import create_app
from service.core.settings import Settings
from service.engine.session import ServedModel

HEIGHT, WIDTH = 40, 60  # no multiples of 32: another's model may have any size
CARD = {
    "name": "pets",
    "class_names": ["cat", "dog", "eel"],
    "thresholds": {"cat": 0.5, "dog": 0.25, "eel": 0.75},
    "size": [HEIGHT, WIDTH],
    "iou_threshold": 0.5,
}
# Corners in pixels, and scores of cat, dog and eel, for a white image.
PLACES = np.array(
    [
        [5, 5, 25, 25, 0.9, 0.1, 0.0],
        [6, 5, 26, 25, 0.8, 0.3, 0.0],  # overlaps the first by 0.9: no cat, but a dog
        [40, 10, 70, 30, 0.4, 0.2, 0.76],  # leaves the image on the right; a weak cat
        [30, 30, 34, 38, 0.0, 0.24, 0.74],  # just below
        [0, 0, 60, 40, 0.5, 0.0, 0.0],  # at its threshold; overlaps the first by 1/6
    ],
    np.float32,
)
# By hand: score, label, box.
WHITE = [
    (0.9, 0, [5, 5, 25, 25]),
    (0.76, 2, [40, 10, 60, 30]),
    (0.5, 0, [0, 0, 60, 40]),
    (0.3, 1, [6, 5, 26, 25]),
]
GREY = [(0.45, 0, [5, 5, 25, 25])]  # at half the light scores halve; cat's threshold is 0.39 there


def another(
    layout: OutputLayout,
    *,
    batch: str | int = "n",
    size: tuple[Any, Any] = (HEIGHT, WIDTH),
    element: str = "float",
    opset: int = 13,
    transposed: bool = False,
    channels: tuple[int, ...] = (0, 1, 2),
) -> ModelProto:
    """A detector that finds PLACES in any image, the surer the lighter its channels."""
    boxes, scores = PLACES[:, :4].copy(), PLACES[:, 4:].copy()
    if layout.boxes == "cxcywh":
        low, high = boxes[:, :2].copy(), boxes[:, 2:].copy()
        boxes = np.concatenate([(low + high) / 2, high - low], axis=1)
    if layout.unit == "normalised":
        boxes /= np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
    axes = "" if opset < 18 else ", axes"
    nodes = f"""
        seen = Gather <axis = 1> (pixels, looked_at)
        grey = ReduceMean {"" if axes else "<axes = [1, 2, 3]>"} (seen{axes})
        light = Reshape (grey, column)
        dark = Mul (light, zero)
        boxes = Add (dark, boxes_table)
        p = Mul (light, scores_table)"""
    if layout.scores == "logit":  # log(p / (1 - p)), kept finite
        nodes += """
        some = Max (p, tiny)
        rest = Sub (one, some)
        odds = Div (some, rest)
        scores = Log (odds)"""
    else:
        nodes += "\nscores = Identity (p)"
    outputs = ["scores", "boxes"]  # not in our order, and with names of ours
    if layout.layout == "yolo":
        nodes += "\nrows = Concat <axis = 2> (boxes, scores)"
        nodes += "\ncolumns = Transpose <perm = [0, 2, 1]> (rows)"
        outputs = ["rows" if transposed else "columns"]
    shape = ", ".join(map(str, (batch, 3, *size)))
    results = ", ".join(f"float[n, a, b] {name}" for name in outputs)
    model = onnx.parser.parse_model(f"""
        <ir_version: 7, opset_import: ["": {opset}]>
        theirs ({element}[{shape}] pixels) => ({results}) {{ {nodes} }}""")
    constants = {
        "boxes_table": boxes[None],
        "scores_table": scores[None],
        "looked_at": np.array(channels),
        "axes": np.array([1, 2, 3]),
        "column": np.array([-1, 1, 1]),
        "zero": np.zeros(1, np.float32),
        "one": np.ones(1, np.float32),
        "tiny": np.full(1, 1e-6, np.float32),
    }
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def table(model: ModelProto, name: str) -> TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


YOLO = OutputLayout("yolo", "cxcywh", "pixels", "probability")
PAIR = OutputLayout("boxes+scores", "xyxy", "normalised", "logit")


def write(folder: Path, model: ModelProto, **card: Any) -> dict[str, Path]:
    paths = {
        "model_path": folder / "theirs.onnx",
        "card_path": folder / "card.json",
        "output_path": folder / "detector.onnx",
    }
    onnx.save(model, paths["model_path"])
    paths["card_path"].write_text(json.dumps({**CARD, **card}))
    return paths


def images(*levels: float) -> np.ndarray:
    return np.stack([np.full((3, HEIGHT, WIDTH), level, np.float32) for level in levels])


def found(answer: list[np.ndarray], image: int) -> list[tuple[float, int, list[float]]]:
    boxes, scores, labels, counts = (part[image] for part in answer)
    assert (labels[counts:] == -1).all()
    return [(float(scores[i]), int(labels[i]), boxes[i].tolist()) for i in range(counts)]


def assert_found(ours: list[Any], wanted: list[Any]) -> None:
    assert [label for _, label, _ in ours] == [label for _, label, _ in wanted]
    for (score, _, box), (right_score, _, right_box) in zip(ours, wanted, strict=True):
        assert score == pytest.approx(right_score, abs=1e-6)  # float32, through a logit and back
        assert box == pytest.approx(right_box, abs=1e-4)  # through shares of the sides


@pytest.fixture(scope="module")
def yolo(tmp_path_factory):
    model = another(YOLO)
    helper.set_model_props(model, {"author": "somebody at /home/somebody"})
    paths = write(tmp_path_factory.mktemp("yolo"), model)
    card, layout = attach(**paths)
    assert (card, layout) == (read_detector(paths["output_path"]).card, YOLO)
    return paths["output_path"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Newer than our opset, trained on BGR; the size of its input is open."""
    model = another(PAIR, opset=20, size=("h", "w"), channels=(0, 0, 1))
    paths = write(tmp_path_factory.mktemp("pair"), model, color_order="BGR")
    _, layout = attach(**paths, unit="normalised", scores="logit")
    assert layout == PAIR
    return paths["output_path"]


@pytest.mark.parametrize("runtime", RUNTIMES, ids=[one.name for one in RUNTIMES])
@pytest.mark.parametrize("which", ["yolo", "pair"])
def test_it_finds_what_the_model_says_in_any_batch(which, runtime, request):
    loaded = runtime(read_detector(request.getfixturevalue(which)))
    if which == "yolo":
        assert_found(found(loaded.run(images(1.0), {}), 0), WHITE)
    lower = {THRESHOLDS_INPUT: np.array([0.39, 0.25, 0.75], np.float32)}
    answer = loaded.run(images(0.5, 1.0, 0.0), lower)
    assert_found(found(answer, 0), GREY)
    assert [label for _, label, _ in found(answer, 1)] == [0, 2, 0, 0, 1]
    assert found(answer, 2) == []
    more = loaded.run(images(1.0), {**lower, IOU_INPUT: np.array([0.95], np.float32)})
    assert [label for _, label, _ in found(more, 0)] == [0, 0, 2, 0, 0, 1]


def test_the_card_says_what_was_told_and_no_more(yolo):
    card = read_detector(yolo).card
    assert card.class_thresholds == [0.5, 0.25, 0.75]
    assert {entry.source for entry in card.thresholds} == {"manual"}
    assert (card.preprocessing.height, card.preprocessing.width) == (HEIGHT, WIDTH)
    assert (card.architecture, card.training.data) == ("not told", "not told")
    assert card.statistics.anchors == 0
    assert len(card.training.checkpoint_sha256) == 64
    model = onnx.load(yolo)
    assert model.opset_import[0].version == 18
    assert model.ir_version == 10
    assert [entry.key for entry in model.metadata_props] == [CARD_KEY, SEAL_KEY]


def test_bgr_is_swapped_in_the_graph(pair):
    """It looks at its first channel twice, which is blue and our last; at green once."""
    colours = np.zeros((3, 3, HEIGHT, WIDTH), np.float32)
    for colour in range(3):  # red, green, blue
        colours[colour, colour] = 1.0
    low = {THRESHOLDS_INPUT: np.full(3, 0.01, np.float32)}
    answer = OnnxRuntime(read_detector(pair)).run(colours, low)
    # float32, through a logit and back
    assert answer[1][:, 0].tolist() == pytest.approx([0.0, 0.3, 0.6], abs=1e-6)
    assert onnx.load(pair).opset_import[0].version == 20


def test_it_is_served_with_equal_answers(yolo):
    model = ServedModel(read_detector(yolo), provider="cpu")
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH * 2, HEIGHT * 2), "white").save(stream, "PNG")
    with TestClient(create_app(Settings(model=yolo), model)) as client:
        response = client.post("/v1/detect", content=stream.getvalue())
    assert response.status_code == 200, response.text
    answer = response.json()
    served = [(d["score"], d["label"], [x / 2 for x in d["box"]]) for d in answer["detections"]]
    assert_found(served, WHITE)
    assert [d["class"] for d in answer["detections"]] == ["cat", "eel", "cat", "dog"]
    assert [d["threshold"] for d in answer["detections"]] == [0.5, 0.75, 0.5, 0.25]


def test_its_thresholds_can_be_set(yolo, tmp_path):
    out = tmp_path / "strict.onnx"
    rewrite_thresholds(yolo, out, {"cat": 0.6})
    answer = OnnxRuntime(read_detector(out)).run(images(1.0), {})
    assert [label for _, label, _ in found(answer, 0)] == [0, 2, 1]


def test_by_command(tmp_path, capsys):
    paths = write(tmp_path, another(YOLO, transposed=True), thresholds=0.5, max_detections=2)
    words = [paths["model_path"], "--card", paths["card_path"], "--out", paths["output_path"]]
    assert main(["attach", *map(str, words)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].endswith("; yolo, cxcywh in pixels, scores as probability")
    answer = OnnxRuntime(read_detector(paths["output_path"])).run(images(1.0), {})
    assert_found(found(answer, 0), WHITE[:2])
    assert main(["inspect", str(paths["output_path"])]) == 0
    assert main(["attach", *map(str, [*words[:4], paths["model_path"]])]) == 2
    assert "is the model; it would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        (another(YOLO, batch=1), {}, "its batch is fixed to 1, .*export it with a dynamic batch"),
        (another(YOLO, size=(40, 61)), {}, r"\[any, 3, 40, 61\], and by the card.* 40, 60\]"),
        (another(YOLO, element="float16"), {}, "'pixels' is FLOAT16, not FLOAT"),
        (another(PAIR), {}, "scores reach from -1.*pass --scores logit"),
        (another(PAIR), {"scores": "logit"}, "boxes reach no further than 1.17: pass --unit norm"),
        (another(YOLO), {"layout": "boxes+scores"}, r"\[batch, A, 4\] and \[batch, A, 3\]"),
        (another(PAIR), {"layout": "yolo"}, r"one output float32 \[batch, 7, A\]"),
    ],
)
def test_what_cannot_be_attached_to_is_refused_in_a_sentence(tmp_path, model, flags, said):
    paths = write(tmp_path, model)
    with pytest.raises(AttachError, match=said) as caught:
        attach(**paths, **flags)
    assert str(caught.value).startswith(f"{paths['model_path']}: ")
    assert not paths["output_path"].exists()


def test_scores_above_1_are_no_probabilities(tmp_path):
    model = another(YOLO)
    scores = table(model, "scores_table")
    scores.CopyFrom(numpy_helper.from_array(3 * numpy_helper.to_array(scores), scores.name))
    with pytest.raises(
        AttachError, match=r"its scores reach from 0 to 1\.3\d.*pass --scores logit"
    ):
        attach(**write(tmp_path, model))


def test_scores_of_other_places_than_the_boxes_are_passed_over():
    shapes = {"more": (2, 9, 3), "boxes": (2, 5, 4), "fewer": (2, 4, 3), "scores": (2, 5, 3)}
    answers = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    node, rows = join_outputs(answers, "boxes+scores", 3)
    assert list(node.input) == ["boxes", "scores"]
    assert rows.shape == (2, 5, 7)


def test_a_batch_that_is_fixed_inside_is_refused(tmp_path):
    model = another(YOLO)
    table(model, "column").CopyFrom(numpy_helper.from_array(np.array([1, 1, 1]), "column"))
    with pytest.raises(AttachError, match="does not run on a batch of 2"):
        attach(**write(tmp_path, model))


def test_another_number_of_classes_is_refused(tmp_path):
    paths = write(tmp_path, another(YOLO), class_names=["cat", "dog"], thresholds=0.5)
    with pytest.raises(AttachError, match=r"outputs are float32 \[2, 7, 5\]; 'yolo' for 2 classes"):
        attach(**paths)


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a"])
def test_what_is_no_model_is_refused(tmp_path, content):
    paths = write(tmp_path, another(YOLO))
    paths["model_path"].write_bytes(content)
    with pytest.raises(AttachError, match=r"not an ONNX file|the file is empty"):
        attach(**paths)


def end_to_end() -> ModelProto:
    """Corners, a score and a class index in each row, padded with zeros."""
    model = another(YOLO, transposed=True)
    rows = np.zeros((5, 6), np.float32)
    rows[:2] = [[5, 5, 25, 25, 0.92, 0], [30, 10, 50, 30, 0.81, 1]]
    tables = {"boxes_table": rows[None, :, :4], "scores_table": rows[None, :, 4:]}
    for name, values in tables.items():
        table(model, name).CopyFrom(numpy_helper.from_array(values, name))
    for node in model.graph.node:
        if node.output[0] == "p":  # what would be scores does not depend on the image
            node.CopyFrom(helper.make_node("Add", ["dark", "scores_table"], ["p"]))
    return model


def test_end_to_end_rows_of_two_classes_are_not_taken_for_a_box_and_two_scores(tmp_path):
    two = {"class_names": ["cat", "dog"], "thresholds": 0.25}
    paths = write(tmp_path, end_to_end(), **two)
    with pytest.raises(AttachError, match=r"look like x1 y1 x2 y2 score class.*--layout yolo"):
        attach(**paths)
    attach(**paths, layout="yolo")
    # A true score, however small, tells them apart.
    model = end_to_end()
    scores = table(model, "scores_table")
    values = numpy_helper.to_array(scores).copy()
    values[0, 1, 1] = 1e-6
    scores.CopyFrom(numpy_helper.from_array(values, scores.name))
    attach(**write(tmp_path, model, **two))
