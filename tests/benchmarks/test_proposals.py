"""Recall of proposals, and the table."""

import sys

import pytest
import torch

from benchmarks import proposals
from benchmarks.proposals import COUNTS, MEASURED, best_overlaps, recall
from benchmarks.result_file import read
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.data.loader import TrainingView
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics

DATA = "digits:images=8,held_out_images=3,size=96"


def test_recall_is_the_share_of_boxes_that_are_found():
    found = recall({100: torch.tensor([0.0, 0.5, 0.72, 1.0])})
    assert found["recall50@100"] == 0.75
    # 0.5 reaches one threshold of ten, 0.72 five, 1 all.
    assert found["ar@100"] == pytest.approx((1 + 5 + 10) / 40)


def test_more_proposals_find_more_and_ignored_boxes_do_not_count(monkeypatch):
    torch.manual_seed(0)
    config = DetectorConfig(
        tuple("0123456789"), (96, 96), channels=16, architecture="faster-rcnn", proposals=7
    )
    detector = build_detector(config)
    saved = Checkpoint(config, detector.state_dict(), ClassStatistics(config.class_names), {})
    dataset = open_dataset(DATA, "test")
    overlaps = best_overlaps(saved, dataset)
    boxes = sum(len(dataset[i].boxes) for i in range(3))
    assert [len(overlaps[count]) for count in COUNTS] == [boxes] * 3
    assert bool((overlaps[300] >= overlaps[100]).all())
    assert float(overlaps[300].mean()) > float(overlaps[100].mean()) > 0

    class FirstIgnored(TrainingView):
        def __getitem__(self, draw):
            image, target = super().__getitem__(draw)
            target["ignore"][0] = True
            return image, target

    monkeypatch.setattr(proposals, "TrainingView", FirstIgnored)
    assert len(best_overlaps(saved, dataset)[100]) == boxes - 3


def test_a_run_is_measured_once_and_goes_into_the_table(tmp_path, monkeypatch, capsys):
    out = tmp_path / "proposals.jsonl"
    flags = ["--data", DATA, "--image-size", "96x96", "--channels", "16", "--steps", "1"]
    words = ["proposals", *flags, "--batch-size", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    proposals.main()
    rows = read(out)
    assert [row["network"] for row in rows] == list(proposals.NETWORKS)
    assert all(0 <= row[name] <= 1 for row in rows for name in MEASURED)
    before = out.read_text()
    monkeypatch.setattr(proposals, "measure", lambda *_: pytest.fail("measured again"))
    proposals.main()
    assert out.read_text() == before
    assert capsys.readouterr().out.count("| digits:images=8") == 4
