from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

import export.quantize.tradeoff
from export.card import DetectorCard
from export.cli import COMMANDS
from export.file import read_detector, write_detector
from export.quantize.tradeoff import AccuracyLossError, Measured, Tradeoff
from ghm_triton.cli import build_parser, main
from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics, as_float32

EXPORT = "export {untrained} --out x.onnx"
QUANTIZE = f"{EXPORT} --quantize int8"
SET = "thresholds set {detector} --out x.onnx"


def ghm(*words: object) -> int:
    """What `ghm` does with these words, errors included."""
    return main([str(word) for word in words])


@pytest.fixture
def digits_checkpoint(checkpoint, tmp_path):
    """A checkpoint trained, it says, on data that is at hand; one class never had a positive."""
    path = tmp_path / "checkpoint.pt"
    training = {**checkpoint.training, "data": "digits:held_out_images=4"}
    positives = checkpoint.statistics.positives.copy()
    positives[1] = 0
    statistics = replace(checkpoint.statistics, positives=positives)
    replace(checkpoint, training=training, statistics=statistics).save(path)
    return path


def test_export_then_verify(digits_checkpoint, tmp_path, capsys):
    out = tmp_path / "made" / "cells.onnx"
    options = ("--policy", "precision=0.7", "--iou", 0.61, "--name", "cells")
    assert ghm("export", digits_checkpoint, "--out", out, *options) == 0
    printed = capsys.readouterr()
    warning = "ghm: warning: class 'green' was never a positive in training"
    assert printed.err.startswith(warning)
    assert printed.err.count("\n") == 1
    card = read_detector(out).card
    assert (card.name, card.threshold_policy) == ("cells", "precision=0.7")
    assert card.iou_threshold == pytest.approx(0.61, abs=1e-7)  # the nearest float32
    assert [entry.name for entry in out.parent.iterdir()] == ["cells.onnx"]
    lines = printed.out.splitlines()
    assert lines[0] == "thresholds by policy 'precision=0.7'"
    for entry in card.thresholds:
        assert any(line.split()[:2] == [entry.name, f"{entry.threshold:.4f}"] for line in lines)
    assert lines[-1].startswith(f"{out}: cells, 64x96 px, ")

    assert ghm("verify", out, "--checkpoint", digits_checkpoint) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 images")
    assert printed.endswith("the file does what the checkpoint does\n")


@pytest.mark.slow
def test_verify_exits_with_1_where_the_file_differs(detector_path, digits_checkpoint, capsys):
    data = ("--data", "digits:held_out_images=9", "--split", "val", "--images", 2)
    assert ghm("verify", detector_path, "--checkpoint", digits_checkpoint, *data) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("2 images")
    assert "PROBLEM the file was exported from another checkpoint" in printed
    assert printed.endswith("FAILED\n")


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_help_says_what_it_does_and_gives_an_example(command, capsys):
    name = command.name  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        build_parser(COMMANDS).parse_args([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  ghm {name} " in text
    example = text.partition("example:\n  ghm ")[2].splitlines()[0]
    build_parser(COMMANDS).parse_args(example.split())  # it must be one that works


def test_thresholds_are_set_by_command(detector_path, tmp_path, capsys):
    out = tmp_path / "new.onnx"
    wish = ("--class", "red=0.4", "--class", "blue=0.5", "--all", 0.3, "--iou", 0.55)
    assert ghm("thresholds", "set", detector_path, *wish, "--out", out) == 0
    card = read_detector(out).card
    assert card.class_thresholds == [as_float32(0.4), as_float32(0.3), 0.5]
    assert card.iou_threshold == as_float32(0.55)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "thresholds by policy 'f1', or by hand (manual)"
    assert lines[3].split()[:3] == ["red", "0.4000", "manual"]
    assert lines[-1] == f"{out}: IoU 0.55"


def test_thresholds_are_set_in_place(detector_path, tmp_path):
    path = Path(shutil.copy(detector_path, tmp_path / "x.onnx"))
    assert ghm("thresholds", "set", path, "--all", 0.5, "--in-place") == 0
    assert read_detector(path).card.class_thresholds == [0.5] * 3
    assert ghm("thresholds", "set", path, "--all", 0.25, "--out", path) == 0
    assert read_detector(path).card.class_thresholds == [0.25] * 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--class", "red", "--in-place"], "expected NAME=SCORE such as WBC=0.4, got 'red'"),
        (["--class", "red=high", "--in-place"], "expected NAME=SCORE such as WBC=0.4"),
        (["--class", "=0.5", "--in-place"], "expected NAME=SCORE such as WBC=0.4"),
        (["--all", "0.5"], "one of the arguments --out --in-place is required"),
        (["--all", "0.5", "--in-place", "--out", "y"], "not allowed with argument"),
    ],
)
def test_what_is_mistyped_is_said_with_the_usage(detector_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        ghm("thresholds", "set", detector_path, *words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def untrained(checkpoint, tmp_path_factory):
    """A detector of digits that has learnt nothing."""
    torch.manual_seed(0)
    config = DetectorConfig(tuple("0123456789"), (64, 64), channels=8, head_convs=1)
    statistics = ClassStatistics(config.class_names, 100, torch.arange(1, 11))
    training = {**checkpoint.training, "data": "digits:images=9,held_out_images=3"}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    Checkpoint(config, build_detector(config).state_dict(), statistics, training).save(path)
    return path


@pytest.mark.slow
def test_a_smaller_file_and_what_it_costs(untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.0)
    out = tmp_path / "small.onnx"
    options = ("--policy", "prior", "--name", "tiny", "--input", "uint8", "--iou", 0.4)
    quantize = ("--quantize", "int8", "--calibrate-images", 4, "--test-split", "val")
    assert ghm("export", untrained, "--out", out, *options, *quantize) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0] == ("3 images of digits, split val; calibrated on 4 of digits, split train")
    assert [line.split()[0] for line in lines[3:6]] == ["float32", "int8", "change"]
    assert lines[9] == "thresholds by policy 'prior'"
    assert lines[-1].startswith(f"{out}: tiny, 64x64 px, ")
    card = read_detector(out).card
    assert (card.name, card.input, card.threshold_policy) == ("tiny", "uint8", "prior")
    assert card.quantization is not None
    assert card.quantization.calibration_images == 4
    assert list(tmp_path.iterdir()) == [out]


def test_a_refusal_shows_the_numbers_and_exits_with_1(
    untrained, detector_path, tmp_path, monkeypatch, capsys
):
    tradeoff = made_up(read_detector(detector_path).card)
    given: dict[str, object] = {}

    def refuse(*_: object, **options: object) -> None:
        given.update(options)
        raise AccuracyLossError(tradeoff, 0.25)

    monkeypatch.setattr(export.quantize.tradeoff, "export_quantized", refuse)
    words = ("--quantize", "int8", "--max-drop", 0.25, "--float-last")
    assert ghm("export", untrained, "--out", tmp_path / "small.onnx", *words) == 1
    printed = capsys.readouterr()
    assert printed.out == tradeoff.table() + "\n"
    assert "class that loses most: a, AP 0.500 to 0.400" in printed.out
    assert printed.err.startswith("ghm: int8 loses 10.00 points of AP (0.5000 to 0.4000), more")
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert (given["max_drop"], given["force"], given["images"]) == (0.25, False, 64)
    assert given["recipe"].float_last  # type: ignore[attr-defined]


def made_up(card: DetectorCard) -> Tradeoff:
    quantization = {
        "precision": "int8",
        "test_data": "digits",
        "test_split": "test",
        "test_images": 3,
        "ap_before": 0.5,
        "ap_after": 0.4,
    }
    card = DetectorCard.model_validate({**card.model_dump(), "quantization": quantization})
    before = Measured("float32", MeanAveragePrecision(0.5, 0.6, 0.5, {"a": (0.5, 0.6)}, 3), 4, 2.0)
    quality = replace(before.quality, ap=0.4, per_class={"a": (0.4, 0.6)})
    return Tradeoff(before, Measured("int8", quality, 1, 1.0), card)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("export missing.pt --out x.onnx", "missing.pt: no such checkpoint"),
        ("export {checkpoint} --out x.onnx --policy best", "unknown policy"),
        ("export {checkpoint} --out x.onnx --iou 7", "[0, 1], got 7.0"),
        ("verify {checkpoint} --checkpoint {checkpoint}", "not an ONNX file"),
        ("verify missing.onnx --checkpoint {checkpoint}", "missing.onnx"),
        ("verify {detector} --checkpoint {checkpoint} --data disk:x", "unknown data set"),
        ("inspect {checkpoint}", "not an ONNX file, or cut short"),
        (f"{QUANTIZE} --calibrate digits:held_out_images=0", "images must be at least 1, got 0"),
        (f"{QUANTIZE} --calibrate disk:x", "unknown data set 'disk'"),
        (f"{QUANTIZE} --calibrate-split best", "'best'"),
        (f"{QUANTIZE} --calibrate-images 0", "images must be at least 1, got 0"),
        (f"{QUANTIZE} --max-drop nan", "max_drop must be at least 0 points, got nan"),
        (f"{EXPORT} --calibrate digits", "--calibrate does nothing without --quantize"),
        (f"{EXPORT} --max-drop 2", "--max-drop does nothing without --quantize"),
        (f"{EXPORT} --force", "--force does nothing without --quantize"),
        (f"{EXPORT} --float-last", "--float-last does nothing without --quantize"),
        (f"{EXPORT} --quantize fp16 --float-last", "does nothing without --quantize int8"),
        (f"{SET} --class pink=0.5", "unknown class 'pink'; known: red, green, blue"),
        (f"{SET} --class red=nan", "class 'red' must lie in [0, 1], got nan"),
        (f"{SET} --class red=0.5 --class red=0.6", "class 'red' is set twice"),
        (SET, "nothing to set"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    detector_path, digits_checkpoint, untrained, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    paths = {"checkpoint": digits_checkpoint, "detector": detector_path, "untrained": untrained}
    assert ghm(*words.format(**paths).split()) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import export.cli", ["torch", "onnx", "onnxruntime", "pydantic"]),
        ("import export.file", ["torch"]),
        ("from ghm_triton.cli import main; main(['inspect', file])", ["torch"]),
        ("from ghm_triton.cli import main; main([*SET, '--in-place', '--all', '0.5'])", ["torch"]),
    ],
    ids=["list", "read", "inspect", "set"],
)
def test_what_needs_no_network_imports_no_torch(detector_path, tmp_path, code, modules):
    path = shutil.copy(detector_path, tmp_path)
    code = (
        f"import sys; file = sys.argv[1]; SET = ['thresholds', 'set', file]; {code};"
        f"print([name for name in {modules} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


EVIL = "\x1b[2J\x1b]0;owned\x07\nPROBLEM \u202ered"


@pytest.fixture
def evil(detector_path, tmp_path):
    """A detector whose names would write to a terminal what they like."""
    model, card = onnx.load(detector_path), read_detector(detector_path).card
    names = [EVIL, *card.class_names[1:]]
    entries = [replace(e, name=name) for e, name in zip(card.thresholds, names, strict=True)]
    training = card.training.model_copy(update={"data": EVIL, "losses": {EVIL: EVIL}})
    changes = {"name": EVIL, "class_names": names, "thresholds": entries, "training": training}
    statistics = replace(card.statistics, class_names=tuple(names))
    card = card.model_copy(update={**changes, "statistics": statistics, "backbone": EVIL})
    write_detector(tmp_path / "evil.onnx", model, card)
    return tmp_path / "evil.onnx"


@pytest.mark.parametrize(
    "words",
    [
        "inspect {0}",
        "inspect {0} --json",
        "thresholds set {0} --in-place --all 0.4",
        "thresholds set {0} --in-place --class pink=0.4",
        "predict {0} {1}",
        "predict {0} {1} --json",
        "verify {0} --checkpoint {2} --data digits:held_out_images=2 --images 1",
    ],
)
def test_names_of_classes_cannot_write_to_the_terminal(
    evil, tmp_path, checkpoint_path, capsys, words
):
    Image.new("RGB", (96, 64), "white").save(tmp_path / "x.png")
    ghm(*words.format(evil, tmp_path / "x.png", checkpoint_path).split())
    printed = "".join(capsys.readouterr())
    assert "owned" in printed
    assert not {*"\x1b\x07\u202e"} & {*printed}
    assert "\nPROBLEM " not in printed or words.startswith("verify")
