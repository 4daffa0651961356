"""The table of proofs says what its rows say, and its rows what the reports say."""

import numpy as np
import pytest

from benchmarks.verify import alone, findings, table
from export.compare import Comparison
from export.verify import VerifyReport
from ghm_triton.detection.evaluate import MeanAveragePrecision


@pytest.fixture
def report() -> VerifyReport:
    made = VerifyReport(images=9, class_names=("cat", "dog"))
    for runtime in ("openvino", "reference"):
        for setting, score in (("own", 1e-7), ("shown", 3e-7)):
            for size in (1, 8):
                made.runs[runtime, setting, size] = Comparison(
                    np.array([10, 5]), box=size * 1e-5, score=score, borderline=size // 8
                )
    made.runs["reference", "own", 8].mismatches.append("a cat too many")
    for side, ap in (("checkpoint", 0.51236), ("openvino", 0.5)):
        made.average_precision[side] = MeanAveragePrecision(ap, 0.8, 0.6, {}, 9)
    return made


def test_a_report_is_a_row_a_runtime_of_its_extremes(report):
    openvino, reference = findings(report, slow_images=4)
    common = {"batches": [1, 8], "settings": 2, "detections": 60, "borderline": 2}
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


def test_slow_runtimes_get_no_more_images_than_there_are(report):
    assert findings(report, slow_images=40)[1]["images"] == 9


def test_the_table_has_a_line_a_row(report):
    about = {"detector": "fcos", "data": "cells", "image_size": [8, 8]}
    rows = [{**about, **found} for found in findings(report, slow_images=4)]
    first, second = table(rows).splitlines()[2:]
    version = rows[0]["version"]
    assert first == (
        f"| fcos | cells | {version} | 9 | 60 | 2, by rounding | 3.0e-07 | 8.0e-05"
        " | 0.5124, 0.5000 |"
    )
    assert second.endswith("| 4 | 60 | 3, 1 of them wrong | 3.0e-07 | 8.0e-05 |  |")


def test_what_both_sides_have_is_not_alone():
    assert alone({"borderline": 0, "mismatches": 0}) == "0"
