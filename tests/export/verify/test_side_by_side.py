from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.file import read_detector
from export.runtimes import OnnxRuntime, Reference, Runtime, UnrunnableError
from export.verify.compare import Outputs, Setting, contract_violations
from export.verify.side_by_side import SideBySide, _proposals
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.training.checkpoint import Checkpoint

SETTING = Setting(("cat", "dog"), np.array([0.5, 0.3], dtype=np.float32), 0.5, 4)


def answer() -> Outputs:
    boxes = np.zeros((4, 4), dtype=np.float32)
    boxes[:2] = [[0, 0, 5, 5], [1, 1, 9, 9]]
    scores = np.array([0.9, 0.4, 0, 0], dtype=np.float32)
    return boxes, scores, np.array([0, 1, -1, -1]), 2


def test_an_answer_that_keeps_the_contract():
    assert contract_violations(answer(), SETTING) == []


@pytest.mark.parametrize(
    ("part", "place", "value", "said"),
    [
        (2, 1, 2, "a label is none of 0..1"),
        (2, 1, -1, "a label is none of 0..1"),
        (2, 3, 0, "the padding is not 0, 0 and -1"),
        (1, 3, 0.1, "the padding is not 0, 0 and -1"),
        (0, 2, 1.0, "the padding is not 0, 0 and -1"),
        (1, 1, 0.95, "the scores do not fall"),
        (1, 1, 0.29, "a score lies below its class's threshold"),
        (1, 1, np.nan, "a score lies below its class's threshold"),
        (2, 1, 0, "a score lies below its class's threshold"),
    ],
)
def test_each_promise_of_the_contract(part, place, value, said):
    outputs = answer()
    outputs[part][place] = value  # type: ignore[index]
    assert said in contract_violations(outputs, SETTING)


@pytest.mark.parametrize("count", [-1, 5])
def test_a_number_of_detections_that_cannot_be(count):
    assert contract_violations((*answer()[:3], count), SETTING) == [
        f"num_detections is {count} of 4"
    ]


def pair_of(
    path: Path, checkpoint: Checkpoint, *runtimes: type[Runtime], slow_images: int = 2
) -> SideBySide:
    return SideBySide(read_detector(path), checkpoint, runtimes, slow_images=slow_images)


@pytest.fixture
def pair(detector_path, checkpoint):
    return pair_of(detector_path, checkpoint, OnnxRuntime)


def test_every_setting_and_batch_size_is_run(pair, samples):
    pair.compare(samples, [1, 3, 8])
    runs = pair.runs
    assert set(runs) == {
        ("onnxruntime", name, size)
        for name in ("the file's own thresholds", "every class shown", "every class, IoU 0.6")
        for size in (1, 3, 8)
    }
    for run in runs.values():
        assert run.mismatches == []
        assert (run.matched > 0).all()
    assert len({int(run.matched.sum()) for (*_, size), run in runs.items() if size == 1}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_file_is_given_whole_batches(pair, samples, monkeypatch, size):
    seen: list[int] = []
    (runtime,) = pair.runtimes
    run = runtime.run

    def counting(batch: np.ndarray, overrides: dict[str, np.ndarray]) -> list[np.ndarray]:
        seen.append(len(batch))
        return run(batch, overrides)

    monkeypatch.setattr(runtime, "run", counting)
    pair.compare(samples, [size])
    assert set(seen) == {size}
    assert len(seen) == 4 * -(-len(samples) // size)  # three settings, and mAP


def test_a_runtime_that_fails_is_told_and_not_asked_again(pair, samples, monkeypatch):
    def fail(*_: object) -> None:
        raise UnrunnableError("out of memory")

    monkeypatch.setattr(pair.runtimes[0], "run", fail)
    pair.compare(samples[:2], [1])
    assert pair.problems == ["out of memory"]
    assert (pair.runtimes, pair.runs, list(pair.detected)) == ([], {}, ["checkpoint"])


def test_slow_runtimes_get_the_first_images_of_all_that_are_compared(
    detector_path, checkpoint, samples, monkeypatch
):
    seen: list[np.ndarray] = []
    pair = pair_of(detector_path, checkpoint, OnnxRuntime, Reference, slow_images=3)
    fast, slow = pair.runtimes
    monkeypatch.setattr(
        slow, "run", lambda batch, overrides: seen.append(batch) or fast.run(batch, overrides)
    )
    key = ("every class shown", 1)
    matched = []
    for start in (0, 2, 4):
        pair.compare(samples[start : start + 2], [1])
        totals = [pair.runs[name, *key].matched.sum() for name in ("reference", "onnxruntime")]
        matched.append(totals)
    (slow_1, fast_1), (slow_2, fast_2), (slow_3, fast_3) = matched
    assert 0 < slow_1 < slow_2 == slow_3
    assert 0 < fast_1 < fast_2 < fast_3
    given = [pair.letterbox(sample.image)[0] for sample in samples[:3]]
    wanted = [given[0], given[1], given[0], given[1], given[0], given[1], *[given[2]] * 3]
    np.testing.assert_array_equal(np.concatenate(seen), torch.stack(wanted))
    assert list(pair.detected) == ["checkpoint", "onnxruntime"]  # no mAP of the first few


def test_a_class_that_scores_low_is_seen(pair):
    probability = torch.rand(4, 500, 3, generator=torch.Generator().manual_seed(0))
    probability[..., 2] *= 1e-3
    thresholds = torch.from_numpy(pair._thresholds_that_show(probability))
    passing = (probability >= thresholds).flatten(0, 1).sum(dim=0)
    assert passing.tolist() == [100, 100, 100]  # 150 places in 4 images, half for 3 classes


def test_an_answer_that_breaks_the_contract_is_a_mismatch(tampered, checkpoint, samples):
    def pad_with_zero(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if "labels" in node.output)
        zero = onnx.numpy_helper.from_array(np.array(0), "zero")
        model.graph.initializer.append(zero)
        node.input[2] = "zero"

    pair = pair_of(tampered(pad_with_zero), checkpoint, OnnxRuntime)
    pair.compare(samples, [3])
    run = pair.runs["onnxruntime", "the file's own thresholds", 3]
    assert run.mismatches[0] == "cloud_0.png: the padding is not 0, 0 and -1"


def test_a_box_of_one_class_is_proposed_for_no_other():
    boxes = torch.arange(24.0).reshape(1, 2, 3, 4)
    scores = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]])
    (own,) = _proposals(Predictions(boxes, scores, scores))
    assert own.boxes.tolist() == boxes.reshape(6, 4).tolist()
    assert own.scores.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    assert own.scores.sum(1).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    (shared,) = _proposals(Predictions(boxes[:, :, :1], scores, scores))
    assert shared.boxes.tolist() == boxes[0, :, 0].tolist()
    assert shared.scores.tolist() == scores[0].tolist()
