from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import export.quantize.tradeoff
from export.card import DetectorCard
from export.file import read_detector
from export.quantize.tradeoff import AccuracyLossError, Measured, Tradeoff
from ghm_triton.cli import main
from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics


def ghm(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def digits_checkpoint(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector of digits that has learnt nothing."""
    torch.manual_seed(0)
    config = DetectorConfig(tuple("0123456789"), (64, 64), channels=8, head_convs=1)
    statistics = ClassStatistics(config.class_names, 100, torch.arange(1, 11))
    training = {**checkpoint.training, "data": "digits:images=9,held_out_images=3"}
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    Checkpoint(config, build_detector(config).state_dict(), statistics, training).save(path)
    return path


@pytest.mark.parametrize("word", ["--calibrate=digits", "--max-drop=2", "--force", "--float-last"])
def test_options_that_would_do_nothing(
    digits_checkpoint: Path, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ghm("export", digits_checkpoint, "--out", tmp_path / "x.onnx", word) == 2
    option = word.partition("=")[0]
    assert capsys.readouterr().err == f"ghm: {option} does nothing without --quantize\n"
    words = ("--quantize", "fp16", "--float-last")
    assert ghm("export", digits_checkpoint, "--out", tmp_path / "x.onnx", *words) == 2
    assert "without --quantize int8" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_smaller_file_and_what_it_costs(
    digits_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.0)
    out = tmp_path / "small.onnx"
    options = ("--policy", "prior", "--name", "tiny", "--input", "uint8", "--iou", 0.4)
    quantize = ("--quantize", "int8", "--calibrate-images", 4, "--test-split", "val")
    assert ghm("export", digits_checkpoint, "--out", out, *options, *quantize) == 0
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--calibrate", "digits:held_out_images=0"), "images must be at least 1, got 0"),
        (("--calibrate", "disk:x"), "unknown data set 'disk'"),
        (("--calibrate-split", "best"), "'best'"),
        (("--calibrate-images", "0"), "images must be at least 1, got 0"),
        (("--max-drop", "nan"), "max_drop must be at least 0 points, got nan"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    digits_checkpoint: Path,
    tmp_path: Path,
    words: tuple[str, str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "small.onnx"
    assert ghm("export", digits_checkpoint, "--out", out, "--quantize", "int8", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
    assert not out.exists()


def test_a_refusal_shows_the_numbers_and_exits_with_1(
    digits_checkpoint: Path,
    detector_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tradeoff = made_up(read_detector(detector_path).card)
    given: dict[str, object] = {}

    def refuse(*_: object, **options: object) -> None:
        given.update(options)
        raise AccuracyLossError(tradeoff, 0.25)

    monkeypatch.setattr(export.quantize.tradeoff, "export_quantized", refuse)
    words = ("--quantize", "int8", "--max-drop", 0.25, "--float-last")
    assert ghm("export", digits_checkpoint, "--out", tmp_path / "small.onnx", *words) == 1
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
