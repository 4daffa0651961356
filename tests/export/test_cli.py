from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from export.cli import COMMANDS
from export.file import read_detector
from ghm_triton.cli import build_parser, main
from ghm_triton.detection.training.checkpoint import Checkpoint


def ghm(*words: object) -> int:
    """What `ghm` does with these words, errors included."""
    return main([str(word) for word in words])


@pytest.fixture
def digits_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A checkpoint trained, it says, on data that is at hand; one class never had a positive."""
    path = tmp_path / "checkpoint.pt"
    training = {**checkpoint.training, "data": "digits:held_out_images=4"}
    positives = checkpoint.statistics.positives.copy()
    positives[1] = 0
    statistics = replace(checkpoint.statistics, positives=positives)
    replace(checkpoint, training=training, statistics=statistics).save(path)
    return path


def test_export_then_verify(
    digits_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
def test_verify_exits_with_1_where_the_file_differs(
    detector_path: Path, digits_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", "digits:held_out_images=9", "--split", "val", "--images", 2)
    assert ghm("verify", detector_path, "--checkpoint", digits_checkpoint, *data) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("2 images")
    assert "PROBLEM the file was exported from another checkpoint" in printed
    assert printed.endswith("FAILED\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "missing.pt", "--out", "x.onnx"], "missing.pt: no such checkpoint"),
        (["export", "{checkpoint}", "--out", "x.onnx", "--policy", "best"], "unknown policy"),
        (["export", "{checkpoint}", "--out", "x.onnx", "--iou", "7"], "[0, 1], got 7.0"),
        (["verify", "{checkpoint}", "--checkpoint", "{checkpoint}"], "not an ONNX file"),
        (["verify", "missing.onnx", "--checkpoint", "{checkpoint}"], "missing.onnx"),
        (
            ["verify", "{detector}", "--checkpoint", "{checkpoint}", "--data", "disk:x"],
            "unknown data set",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    detector_path: Path,
    digits_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = {"checkpoint": digits_checkpoint, "detector": detector_path}
    assert ghm(*(word.format(**paths) for word in words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("command", COMMANDS, ids=[command.name for command in COMMANDS])
def test_help_says_what_it_does_and_gives_an_example(
    command: object, capsys: pytest.CaptureFixture[str]
) -> None:
    name = command.name  # type: ignore[attr-defined]
    with pytest.raises(SystemExit) as ended:
        build_parser(COMMANDS).parse_args([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  ghm {name} " in text
    example = text.partition("example:\n  ghm ")[2].splitlines()[0]
    build_parser(COMMANDS).parse_args(example.split())  # it must be one that works


def test_listing_the_commands_imports_nothing_heavy() -> None:
    code = (
        "import sys, export.cli;"
        "print([m for m in ('torch', 'onnx', 'onnxruntime', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
