"""Measurements of int8 on real files, and their table."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks import quantize
from benchmarks.quantize import BEFORE, KEY, table, trained, untrained
from benchmarks.result_file import latest
from export.quantize.convert import Int8Recipe
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.evidence import ClassStatistics

DATA = "digits:images=9,held_out_images=3,size=96"


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one recipe and few timed calls."""
    monkeypatch.setattr(quantize, "RECIPES", {"int8": Int8Recipe()})
    monkeypatch.setattr("export.quantize.tradeoff.SECONDS", 0.1)


@pytest.mark.usefixtures("briefly")
def test_random_weights_are_timed_in_every_precision():
    rows = list(untrained("tiny:64x96"))
    assert [row["variant"] for row in rows] == [BEFORE, "fp16", "int8"]
    assert all(row["image_size"] == [64, 96] and row["backbone"] == "tiny" for row in rows)
    sizes = [row["bytes"] for row in rows]
    assert sizes[2] < sizes[1] < sizes[0]
    assert rows[0]["times_as_fast"] == 1.0
    for row in rows:
        # Of milliseconds that are themselves rounded to a thousandth.
        assert row["times_as_fast"] == pytest.approx(rows[0]["ms"] / row["ms"], abs=0.02)
    assert "ap" not in rows[0]


@pytest.mark.usefixtures("briefly")
@pytest.mark.filterwarnings("ignore:class:ghm_triton.evidence.ThresholdWarning")
def test_a_checkpoint_is_measured_on_its_own_test_split(tmp_path: Path):
    names = tuple("0123456789")
    config = DetectorConfig(names, (96, 96), channels=16)
    torch.manual_seed(0)
    training = {**TrainOptions(data=DATA).to_dict(), "step": 7, "versions": {}}
    statistics = ClassStatistics(names, 100, torch.ones(10, dtype=torch.int64))
    model = build_detector(config).state_dict()
    Checkpoint(config, model, statistics, training).save(tmp_path / "c.pt")
    rows = list(trained("scenes", tmp_path / "c.pt"))
    assert [row["variant"] for row in rows] == [BEFORE, "fp16", "int8"]
    for row in rows:
        assert (row["detector"], row["architecture"], row["steps"]) == ("scenes", "retinanet", 7)
        assert (row["test_images"], row["calibration_images"]) == (3, 9)
        assert set(row["ap_per_class"]) <= set(names)
        assert 0 <= row["ap"] <= row["ap50"] <= 1
    assert rows[2]["recipe"]["weight_bits"] == 7
    assert rows[0]["recipe"] == {}


def test_the_table_shows_the_newest_row_of_each_variant():
    row = {"detector": "BCCD", "architecture": "fcos", "backbone": "tiny", "image_size": [64, 96]}
    row |= {"bytes": 2_500_000, "ms": 4.0, "times_as_fast": 1.0, "variant": BEFORE}
    rows = [
        {**row, "ap": 0.1, "ap50": 0.2},
        {**row, "variant": "int8", "ms": 2.0, "times_as_fast": 2.0},
        {**row, "ap": 0.5, "ap50": 0.75},
    ]
    text = re.sub(" +", " ", table(latest(rows, KEY)))
    assert text.splitlines()[2:] == [
        "| BCCD, fcos-tiny, 64x96 | int8 | | | 2.50 | 2.00 | 2.00x |",
        "| BCCD, fcos-tiny, 64x96 | float32 | 0.500 | 0.750 | 2.50 | 4.00 | 1.00x |",
    ]
