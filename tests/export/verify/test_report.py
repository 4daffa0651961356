from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto

from export.detector import export_detector
from export.runtimes import OpenVino
from export.verify.compare import Comparison, Tolerance
from export.verify.verify import VerifyReport, verify
from ghm_triton.detection.data import Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import in_image_pixels
from ghm_triton.detection.models.config import DetectorConfig

Tamper = Callable[[Callable[[ModelProto], None]], Path]


def test_an_export_stands_for_its_checkpoint(detector_path, checkpoint_path, samples):
    report = verify(detector_path, checkpoint_path, samples)
    assert report.problems == []
    assert report.ok
    assert report.images == len(samples) == 11
    assert {size for _, _, size in report.runs} == {1, 3, 8}
    total = report.total()
    assert (total.matched > 100).all()
    assert total.borderline == 0
    # What the runtimes differ by in practice, ten times over; not the tolerance of the verdict.
    assert 0 < total.score < 1e-5
    assert 0 < total.box < 1e-3


def test_the_report_shows_the_largest_differences(detector_path, checkpoint_path, samples):
    report = verify(detector_path, checkpoint_path, samples, images=2, batch_sizes=[3])
    lines = report.table().splitlines()
    assert lines[0] == "2 images, the file on a CPU against the checkpoint in torch"
    assert lines[2] == f"onnxruntime {onnxruntime.__version__}"
    own = report.runs["onnxruntime", "the file's own thresholds", 3]
    (row,) = (line for line in lines if line.startswith("the file's own thresholds"))
    assert row.split()[-5:] == [
        *("3", str(own.matched.sum()), "0"),
        *(f"{own.score:.1e}", f"{own.box:.1e}"),
    ]
    counts = report.total().matched.tolist()
    assert lines[-2] == "compared by class: red {}, green {}, blue {}".format(*counts)
    assert lines[-1] == "the file does what the checkpoint does"


def with_truth(path: Path, samples: list[Sample]) -> list[Sample]:
    """What the file itself detects, for ground truth: it then finds all, in every image."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    letterbox = Letterbox(DetectorConfig(("red", "green", "blue"), (64, 96), mean=(0.4, 0.5, 0.6)))
    made = []
    for sample in samples:
        image, scales = letterbox(sample.image)
        answer = session.run(None, {"images": image[None].numpy()})
        boxes, labels = (torch.from_numpy(answer[i][0, : answer[3][0]]) for i in (0, 2))
        own = in_image_pixels(boxes, scales, sample.image.size)
        kept = (own[:, 2:] - own[:, :2]).min(dim=1).values > 1
        ignore = torch.zeros(int(kept.sum())).bool()
        made.append(replace(sample, boxes=own[kept], labels=labels[kept], ignore=ignore))
    return made


@pytest.mark.slow
def test_every_runtime_is_compared_and_those_that_can_are_given_a_map(
    detector_path, checkpoint_path, samples
):
    truth = with_truth(detector_path, samples[:4])
    report = verify(detector_path, checkpoint_path, truth, batch_sizes=[3], runtimes=["all"])
    assert report.problems == []
    few, many = (
        sum(int(run.matched.sum()) for key, run in report.runs.items() if key[0] == name)
        for name in ("reference", "openvino")
    )
    assert 0 < few < many
    found = report.average_precision
    assert list(found) == ["checkpoint", "onnxruntime", "openvino"]
    for side in found.values():
        # Not 1: scores from 0.01 on are shown, and more boxes than the truth has.
        assert 0.5 < side.ap < side.ap50 <= 1.0
        assert side.images == 4
        assert side.ap == pytest.approx(found["checkpoint"].ap, abs=1e-3)  # ties may reorder
    lines = report.table().splitlines()
    assert any(line.startswith("reference") and line.endswith("2 of the images") for line in lines)
    assert f"checkpoint   {found['checkpoint'].ap:.4f}  {found['checkpoint'].ap50:.4f}" in lines


def test_without_ground_truth_there_is_no_map(detector_path, checkpoint_path, samples):
    report = verify(detector_path, checkpoint_path, samples[:2], batch_sizes=[1])
    assert report.average_precision == {}
    assert "mAP" not in report.table()


@pytest.mark.slow
def test_a_file_that_takes_uint8_images_stands_for_its_checkpoint(
    checkpoint_path, samples, tmp_path
):
    path = tmp_path / "detector.onnx"
    export_detector(checkpoint_path, path, input_type="uint8")
    report = verify(path, checkpoint_path, samples, images=4, batch_sizes=[3])
    assert report.problems == []


def test_a_runtime_that_refuses_the_file_spoils_the_verdict_not_the_others(
    detector_path, checkpoint_path, samples, monkeypatch
):
    def refuse(*_: object) -> None:
        raise RuntimeError("no such operator")

    asked = ["onnxruntime", "openvino"]
    for place, said in (("_load", "refuses the file"), ("_run", "fails on a batch of 3")):
        with monkeypatch.context() as patch:
            patch.setattr(OpenVino, place, refuse)
            report = verify(
                detector_path, checkpoint_path, samples[:3], batch_sizes=[3], runtimes=asked
            )
        assert report.problems == [f"openvino {said}: no such operator"]
        assert {name for name, *_ in report.runs} == {"onnxruntime"}
        assert len(report.runs) == 3


def test_images_are_spread_over_the_data(detector_path, checkpoint_path, samples):
    class Recording:
        def __init__(self) -> None:
            self.asked: list[int] = []

        def __len__(self) -> int:
            return len(samples)

        def __getitem__(self, index: int) -> Sample:
            self.asked.append(index)
            return samples[index]

    recording = Recording()
    report = verify(detector_path, checkpoint_path, recording, images=3, batch_sizes=[1])
    assert recording.asked == [0, 3, 7]
    assert report.images == 3


def test_more_borderline_cases_than_rounding_makes_are_a_failure():
    def report(matched: int, borderline: int) -> list[str]:
        made = VerifyReport(1, ("cat",))
        made.runs["onnxruntime", "own", 1] = Comparison(np.array([matched]), borderline=borderline)
        made.conclude()
        return made.problems

    assert report(1000, 10) == []
    assert report(50, 1) == []
    (problem,) = report(1000, 11)
    assert problem.startswith("onnxruntime: 11 detections are borderline")
    assert len(report(50, 2)) == 1


def test_nothing_compared_is_not_a_success():
    report = VerifyReport(1, ("cat",))
    report.runs["onnxruntime", "own", 1] = Comparison(np.array([0]))
    report.conclude()
    assert report.problems == [
        "onnxruntime: neither side detects anything in these images; nothing was compared"
    ]


def test_many_mismatches_are_counted_not_listed():
    report = VerifyReport(1, ("cat",))
    texts = [f"mismatch {i}" for i in range(37)]
    report.runs["onnxruntime", "own", 1] = Comparison(np.array([5]), mismatches=texts)
    report.conclude()
    assert report.problems[0] == "onnxruntime, own, batch 1: mismatch 0"
    assert report.problems[-1] == "onnxruntime, own, batch 1: 27 more like these"
    assert len(report.problems) == 11


def test_a_tighter_tolerance_is_one_to_ask_for(detector_path, checkpoint_path, samples):
    impossible = Tolerance(box=1e-9, score=1e-12)
    report = verify(detector_path, checkpoint_path, samples, images=2, tolerance=impossible)
    assert not report.ok


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, r"no images to compare on \(11 given, 0 asked"),
        ({"images": -1}, r"no images to compare on \(11 given, -1 asked"),
        ({"slow_images": 0}, "slow runtimes need an image or more, got 0"),
        *(
            ({"batch_sizes": sizes}, r"batch sizes must lie in 1\.\.64")
            for sizes in ([], [0], [1, 65])
        ),
    ],
)
def test_options_out_of_range_are_refused(
    detector_path, checkpoint_path, samples, options, message
):
    with pytest.raises(ValueError, match=message):
        verify(detector_path, checkpoint_path, samples, **options)
