from __future__ import annotations

import copy
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import export.detector
from export.card import IOU_INPUT, THRESHOLDS_INPUT
from export.detector import (
    LOSS_OPTIONS,
    METHOD_OPTIONS,
    export_detector,
    make_card,
    without_folders,
)
from export.file import read_detector, write_detector
from export.preprocess import accept_uint8
from ghm_triton.detection.training.checkpoint import CheckpointError
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.evidence import ClassStatistics, ClassThresholds, ThresholdWarning

SHA = "0" * 64


def test_the_card_says_what_the_checkpoint_holds(detector_path, checkpoint_path, checkpoint):
    card = read_detector(detector_path).card
    config, options = checkpoint.config, TrainOptions().settled("retinanet")
    assert (card.architecture, card.backbone, card.name) == ("retinanet", "tiny", "retinanet-tiny")
    assert tuple(card.class_names) == config.class_names
    assert (card.candidates, card.max_detections) == (config.candidates, config.max_detections)
    frame = card.preprocessing
    assert (frame.height, frame.width) == config.image_size
    assert (frame.mean, frame.std, frame.pad_value) == (config.mean, config.std, config.pad_value)
    assert card.statistics.to_dict() == (checkpoint.statistics.to_dict())
    training = card.training
    assert (training.data, training.seed, training.steps) == ("voc:cells", 0, 1000)
    assert training.versions == checkpoint.training["versions"]
    minimised = (*LOSS_OPTIONS, "guided_loss")
    assert training.losses == {name: getattr(options, name) for name in minimised}
    digest = hashlib.sha256(checkpoint_path.read_bytes()).hexdigest()
    assert training.checkpoint_sha256 == digest


@pytest.mark.parametrize(
    ("used", "said"),
    [
        ({"mining": "s-ohem", "guided_loss": True}, {"mining": "s-ohem", "guided_loss": True}),
        ({"init": "optimal", "guided_loss": False}, {"init": "optimal"}),
        ({"guided_loss": False, "adversarial": "asdn"}, {"adversarial": "asdn"}),
        ({"sampling": False}, {"sampling": False, "guided_loss": True}),
        ({"sampling": True, "guided_loss": False}, {}),
        ({"mining": "none", "init": "prior", "guided_loss": False, "adversarial": "none"}, {}),
    ],
)
@pytest.mark.parametrize("assigner", ["iou", "cleanliness"])
def test_the_card_names_the_methods_that_were_used(checkpoint, used, said, assigner):
    config = replace(checkpoint.config, assigner=assigner)
    said = said | ({} if assigner == "iou" else {"assigner": assigner})
    checkpoint = replace(checkpoint, config=config, training={**checkpoint.training, **used})
    losses = make_card(checkpoint, SHA).training.losses
    assert {name: losses[name] for name in losses if name not in LOSS_OPTIONS} == said


def test_a_checkpoint_from_before_there_were_methods_is_told_of_none(checkpoint):
    before = {k: v for k, v in checkpoint.training.items() if k not in METHOD_OPTIONS}
    checkpoint = replace(checkpoint, training=before)
    assert set(make_card(checkpoint, SHA).training.losses) == set(LOSS_OPTIONS)


def test_the_thresholds_are_the_policys_in_card_and_graph(detector_path, checkpoint):
    card = read_detector(detector_path).card
    chosen = ClassThresholds.from_statistics(checkpoint.statistics, "f1")
    assert card.threshold_policy == "f1"
    assert card.thresholds == list(chosen)
    assert len(set(card.class_thresholds)) == 3
    graph = onnx.load(detector_path).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert values[THRESHOLDS_INPUT].dtype == values[IOU_INPUT].dtype == np.float32
    assert np.array_equal(values[THRESHOLDS_INPUT], chosen.as_array())
    assert values[IOU_INPUT].tolist() == [np.float32(0.3)] == [card.iou_threshold]


def test_the_same_checkpoint_gives_the_same_bytes(detector_path, checkpoint_path, tmp_path):
    again, other = tmp_path / "another_name.onnx", tmp_path / "another_name.uint8.onnx"
    code = (
        "import sys; from export.detector import export_detector;"
        "export_detector(*sys.argv[1:], input_type='both')"
    )
    subprocess.run(
        [sys.executable, "-c", code, checkpoint_path, again],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert again.read_bytes() == detector_path.read_bytes()
    file = read_detector(detector_path)
    write_detector(tmp_path / "here.onnx", *accept_uint8(onnx.load(detector_path), file.card))
    assert other.read_bytes() == (tmp_path / "here.onnx").read_bytes()


def test_the_file_tells_no_path_of_the_machine(detector_path, checkpoint_path):
    content = detector_path.read_bytes()
    places = [Path.cwd(), Path.home(), Path(sys.prefix), Path(torch.__file__).parent]
    places += [checkpoint_path.parent, detector_path.parent, Path(export.detector.__file__).parent]
    for place in places:
        assert str(place).encode() not in content
    assert b"private" not in content  # a folder of the data set
    assert re.findall(rb"[\w/.-]+\.py\b", content) == []


@pytest.fixture
def no_tracing(detector_path, monkeypatch):
    """Take the graph that was exported before, to save the time."""
    monkeypatch.setattr(export.detector, "build_graph", lambda *_: onnx.load(detector_path))


@pytest.mark.usefixtures("no_tracing")
@pytest.mark.parametrize(
    ("input_type", "files"),
    [
        ("float32", {"d.onnx": "float32"}),
        ("uint8", {"d.onnx": "uint8"}),
        ("both", {"d.onnx": "float32", "d.uint8.onnx": "uint8"}),
    ],
)
def test_one_export_writes_the_variants_asked_for(checkpoint_path, tmp_path, input_type, files):
    card = export_detector(checkpoint_path, tmp_path / "d.onnx", input_type=input_type)
    cards = {path.name: read_detector(path).card for path in tmp_path.iterdir()}
    assert {name: its.input for name, its in cards.items()} == files
    assert cards["d.onnx"] == card
    rest = [its.model_dump(exclude={"input"}) for its in cards.values()]
    assert all(one == rest[0] for one in rest)


def test_the_second_file_is_no_folder_either(checkpoint_path, tmp_path):
    (tmp_path / "d.uint8.onnx").mkdir()
    with pytest.raises(ValueError, match=r"d\.uint8\.onnx is a folder"):
        export_detector(checkpoint_path, tmp_path / "d.onnx", input_type="both")
    assert not (tmp_path / "d.onnx").exists()


@pytest.mark.usefixtures("no_tracing")
def test_an_export_that_fails_half_way_leaves_the_old_file(checkpoint_path, tmp_path, monkeypatch):
    path = tmp_path / "detector.onnx"
    path.write_bytes(b"the old file")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        export_detector(checkpoint_path, path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_the_checkpoint_is_not_overwritten(checkpoint_path):
    before = checkpoint_path.read_bytes()
    with pytest.raises(ValueError, match="it would be overwritten"):
        export_detector(checkpoint_path, checkpoint_path)
    assert checkpoint_path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "input_type", "said"),
    [
        ("", "float32", "is a folder; name a file"),
        ("d.onnx", "int8", "one of float32, uint8, both, got 'int8'"),
    ],
)
def test_what_cannot_be_written_is_named(checkpoint_path, tmp_path, name, input_type, said):
    with pytest.raises(ValueError, match=said):
        export_detector(checkpoint_path, tmp_path / name, input_type=input_type)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing\.pt: no such checkpoint"):
        export_detector(tmp_path / "missing.pt", tmp_path / "detector.onnx")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *(({"iou_threshold": x}, rf"lie in \[0, 1\], got {x}") for x in (-0.1, 1.1, float("nan"))),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"name": " "}, "name must not be blank"),
    ],
)
def test_options_out_of_range_are_named(checkpoint, options, said):
    with pytest.raises(ValueError, match=said):
        make_card(checkpoint, SHA, **options)


@pytest.mark.parametrize("key", ["data", "seed", "step", "versions", "strength"])
def test_a_checkpoint_that_does_not_say_how_it_was_trained(checkpoint, key):
    silent = replace(
        checkpoint, training={k: v for k, v in checkpoint.training.items() if k != key}
    )
    with pytest.raises(CheckpointError, match=f"does not say its training's {key}"):
        make_card(silent, SHA)


def test_statistics_of_other_classes_are_refused(checkpoint):
    values = {**checkpoint.statistics.to_dict(), "class_names": ["red", "green", "pink"]}
    other = replace(checkpoint, statistics=ClassStatistics.from_dict(values))
    with pytest.raises(CheckpointError, match="of red, green, pink and the detector of red, green"):
        make_card(other, SHA)


def test_a_class_without_evidence_is_warned_of_and_told_in_the_card(checkpoint):
    poor = copy.deepcopy(checkpoint)
    poor.statistics.positives[1] = 0
    with pytest.warns(ThresholdWarning, match="'green' was never a positive"):
        card = make_card(poor, SHA)
    assert [entry.source for entry in card.thresholds] == ["policy", "fallback", "policy"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("digits", "digits"),
        ("digits:noise=0.1,size=96x128", "digits:noise=0.1,size=96x128"),
        ("voc:/home/someone/bccd", "voc:bccd"),
        ("voc:/home/some one/bccd/", "voc:bccd/"),
        ("voc:../bccd", "voc:bccd"),
        ("coco:C:\\Users\\someone\\cells", "coco:C:cells"),
    ],
)
def test_a_data_set_is_told_without_its_folders(data, told):
    assert without_folders(data) == told
