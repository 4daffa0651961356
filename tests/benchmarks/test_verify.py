"""Rows of verification reports, and their table."""

import re

import numpy as np
import pytest

from benchmarks.verify import findings, table
from export.verify.compare import Comparison
from export.verify.verify import VerifyReport
from ghm_triton.detection.evaluate import MeanAveragePrecision


@pytest.fixture
def report() -> VerifyReport:
    made = VerifyReport(images=9, class_names=("cat", "dog"))
    for runtime in ("openvino", "reference"):
        for setting, score in (("own", 1e-7), ("shown", 3e-7)):
            for size in (1, 3, 8):
                made.runs[runtime, setting, size] = Comparison(
                    np.array([10, 5]), box=size * 1e-5, score=score, borderline=size // 8
                )
    made.runs["reference", "own", 8].mismatches.append("a cat too many")
    for side, ap in (("checkpoint", 0.51236), ("openvino", 0.5)):
        made.average_precision[side] = MeanAveragePrecision(ap, 0.8, 0.6, {}, 9)
    return made


def test_a_report_is_a_row_a_runtime_of_its_extremes(report):
    openvino, reference = findings(report, slow_images=4)
    common = {"batches": [1, 3, 8], "settings": 2, "detections": 90, "borderline": 2}
    common |= {"score": 3e-7, "box": 8e-5}
    assert openvino == {
        **common,
        "runtime": "openvino",
        "version": openvino["version"],
        "images": 9,
        "mismatches": 0,
        "checkpoint_ap": 0.5124,
        "file_ap": 0.5,
    }
    assert reference["images"] == 4
    assert reference["mismatches"] == 1
    assert "file_ap" not in reference
    assert reference["version"].startswith("reference ")


def test_the_table_has_a_line_a_detector_and_a_column_a_runtime(report):
    cells, scenes = {"detector": "fcos", "data": "cells"}, {"detector": "fcos", "data": "scenes"}
    openvino, reference = findings(report, slow_images=4)
    rows = [{**cells, **openvino}, {**cells, **reference}, {**scenes, **reference}]
    head, _, first, second = re.sub(" +", " ", table(rows)).splitlines()
    assert head.endswith(f"| {openvino['version']} | {reference['version']} |")
    agreed = "90 in 9: 3e-07, 8e-05 px; 2 decided by rounding"
    wrong = "90 in 4: 3e-07, 8e-05 px; 2 decided by rounding; 1 wrong"
    assert first == f"| fcos | cells | 0.5124, 0.5000 | {agreed} | {wrong} |"
    assert second == f"| fcos | scenes | | | {wrong} |"
