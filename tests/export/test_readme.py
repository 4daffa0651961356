"""The README's section on the file, run as it is printed there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.file import read_detector, write_detector
from export.inspect import describe
from export.preprocess import accept_uint8
from ghm_triton.cli import build_parser, gather, main

README = Path(__file__).parents[2] / "README.md"
CLASSES = ["Platelets", "RBC", "WBC"]  # as the README's detector


def blocks(kind: str) -> list[str]:
    """The code blocks of the section, in order."""
    (section,) = re.findall(r"^## The file\n(.*?)^## ", README.read_text(), re.M | re.S)
    return re.findall(rf"```{kind}\n(.*?)```", section, re.S)


def commands() -> list[list[str]]:
    return [
        line[2:].split()
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ ")
    ]


# A detector such as YOLO writes: `[B, 4 + 2, 3]`, here the same three boxes in any image.
ANOTHER = """
    <ir_version: 10, opset_import: ["": 18]>
    yolo (float[batch, 3, 640, 640] images) => (float[batch, 6, 3] output0)
    <float[1, 6, 3] found = {50, 200, 600, 50, 200, 80, 40, 40, 60, 40, 50, 80, 0.9, 0, 0.1,
     0, 0.8, 0.3}, float[1] nothing = {0}, int64[3] axes = {1, 2, 3}, int64[3] column = {-1, 1, 1}>
    {
        light = ReduceMean (images, axes)
        dark = Mul (light, nothing)
        each = Reshape (dark, column)
        output0 = Add (each, found)
    }"""


@pytest.fixture
def folder(detector_path, samples, tmp_path, monkeypatch):
    """The folder that the README's reader is in: a detector's two variants, and a photo."""
    model, card = onnx.load(detector_path), read_detector(detector_path).card
    entries = [
        replace(entry, name=name) for entry, name in zip(card.thresholds, CLASSES, strict=True)
    ]
    card = card.model_copy(update={"class_names": CLASSES, "thresholds": entries})
    write_detector(tmp_path / "detector.onnx", model, card)
    write_detector(tmp_path / "detector.uint8.onnx", *accept_uint8(model, card))
    samples[0].image.save(tmp_path / "photo.jpg")
    onnx.save(onnx.parser.parse_model(ANOTHER), tmp_path / "yolo.onnx")
    (described,) = blocks("json")
    (tmp_path / "card.json").write_text(described)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, README.name, "exec"), names)  # noqa: S102  (our own README)
    return names


@pytest.mark.slow
def test_every_command_is_one_that_works(folder):
    typed = commands()
    assert [words[1] for words in typed] == [
        *("export", "inspect", "thresholds"),
        *("export", "attach", "inspect"),
    ]
    parser = build_parser(gather())
    for words in typed:
        assert words[0] == "ghm"
        parser.parse_args(words[1:])
        if words[1] != "export":  # which is run in other tests, and takes its time
            assert main(words[1:]) == 0
    assert read_detector("pets.onnx").card.class_names == ["cat", "dog"]


def test_what_inspect_shows_is_of_the_shape_that_it_prints(folder):
    shown = blocks("console")[0].partition("$ ghm inspect detector.onnx\n")[2]
    printed = describe(read_detector("detector.onnx"))

    def labels(text: str) -> list[str]:
        found = re.findall(r"^(?:  (\w+(?: \w+)?)  |(\w\S*))", text, re.M)
        return [first or second for first, second in found]

    assert labels(shown) == labels(printed)
    assert len(labels(shown)) > 15


def test_the_detector_runs_and_its_thresholds_are_overridden(folder, capsys):
    first, override, _ = blocks("python")
    names = run(first, {})
    count = int(names["count"][0])
    printed = capsys.readouterr().out.splitlines()
    best = " ".join([CLASSES[names["labels"][0, 0]], str(names["scores"][0, 0]), "["])
    assert len(re.findall("^(?:Platelets|RBC|WBC) 0", "\n".join(printed), re.M)) == count > 3
    assert printed[0].startswith(best)
    assert names["scores"][0, :count].min() < 0.8
    run(override, names)
    stricter = int(names["count"][0])
    assert 0 < stricter < count
    assert names["scores"][0, :stricter].min() >= 0.8


def test_openvino_detects_the_same_by_thresholds_set_by_hand(folder):
    pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    (words,) = [words for words in commands() if words[1] == "thresholds"]
    assert main(words[1:]) == 0
    first, _, openvino = blocks("python")
    ours = run(first.replace("detector.uint8.onnx", "by_hand.onnx"), {})
    found = run(openvino, {})["found"]
    assert found["num_detections"].tolist() == ours["count"].tolist()
    assert ours["count"][0] > 3
    np.testing.assert_array_equal(found["labels"], ours["labels"])
    # The verifier's tolerances between runtimes.
    np.testing.assert_allclose(found["scores"], ours["scores"], atol=1e-4)
    np.testing.assert_allclose(found["boxes"], ours["boxes"], atol=0.1)
