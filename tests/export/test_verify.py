from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, numpy_helper

from export.compare import Comparison, Tolerance
from export.contract import CARD_KEY, IOU_INPUT, THRESHOLDS_INPUT, CardError, DetectorCard
from export.detector import export_detector
from export.runtimes import OpenVino
from export.verify import VerifyReport, verify
from ghm_triton.detection.checkpoint import Checkpoint
from ghm_triton.detection.config import DetectorConfig
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import in_image_pixels
from ghm_triton.detection.transforms import Letterbox

Tamper = Callable[[Callable[[ModelProto], None]], Path]


def edit(model: ModelProto, name: str, how: Callable[[np.ndarray], Any]) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = np.asarray(how(numpy_helper.to_array(tensor).copy()))
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def edit_card(model: ModelProto, **fields: Any) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == CARD_KEY)
    entry.value = DetectorCard.from_json(entry.value).model_copy(update=fields).to_json()


def card_of(model: ModelProto) -> DetectorCard:
    return DetectorCard.from_json(model.metadata_props[0].value)


def node(model: ModelProto, kind: str, place: int = 0) -> onnx.NodeProto:
    return [one for one in model.graph.node if one.op_type == kind][place]


def add_to(place: int, amount: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] += amount
        return values

    return change


def test_an_export_stands_for_its_checkpoint(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
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


def test_the_report_shows_the_largest_differences(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
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


def test_every_runtime_is_compared_and_those_that_can_are_given_a_map(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
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
    assert f"checkpoint   {found['checkpoint'].ap:7.4f}  {found['checkpoint'].ap50:7.4f}" in lines


def test_a_worse_file_has_a_lower_map(
    tampered: Tamper, detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
    truth = with_truth(detector_path, samples[:4])
    path = tampered(trade_two_classes)
    found = verify(path, checkpoint_path, truth, batch_sizes=[3]).average_precision
    assert found["onnxruntime"].ap < found["checkpoint"].ap - 0.1


def test_without_ground_truth_there_is_no_map(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
    report = verify(detector_path, checkpoint_path, samples[:2], batch_sizes=[1])
    assert report.average_precision == {}
    assert "mAP" not in report.table()


def test_a_file_that_takes_uint8_images_stands_for_its_checkpoint(
    checkpoint_path: Path, samples: list[Sample], tmp_path: Path
) -> None:
    path = tmp_path / "detector.onnx"
    export_detector(checkpoint_path, path, input_type="uint8")
    report = verify(path, checkpoint_path, samples, images=4, batch_sizes=[3])
    assert report.problems == []


def test_a_runtime_that_refuses_the_file_spoils_the_verdict_not_the_others(
    detector_path: Path,
    checkpoint_path: Path,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


def test_images_are_spread_over_the_data(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
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


def shift_class_scores(model: ModelProto) -> None:
    edit(model, "detector.head.classification_head.cls_logits.bias", lambda bias: bias + 0.002)


def shift_one_class_of_one_anchor(model: ModelProto) -> None:
    # Predictors are 9 anchors x 3 classes: anchor 4, class 'blue'.
    edit(model, "detector.head.classification_head.cls_logits.bias", add_to(4 * 3 + 2, 0.01))


def shift_boxes(model: ModelProto) -> None:
    edit(model, "detector.head.regression_head.bbox_reg.bias", lambda bias: bias + 0.01)


def change_a_backbone_weight(model: ModelProto) -> None:
    edit(model, "detector.backbone.stem.0.0.weight", lambda weight: weight * 1.01)


def cut_scores_in_nms(model: ModelProto) -> None:
    edit(model, node(model, "NonMaxSuppression").input[4], lambda _: np.array([0.5], np.float32))


def keep_three_boxes_a_class(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([3]), "three"))
    node(model, "NonMaxSuppression").input[2] = "three"


def ignore_the_iou_given(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.3], np.float32), "fixed"))
    node(model, "NonMaxSuppression").input[3] = "fixed"


def ignore_the_thresholds_given(model: ModelProto) -> None:
    (own,) = (t for t in model.graph.initializer if t.name == THRESHOLDS_INPUT)
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(own), "fixed"))
    node(model, "GreaterOrEqual").input[1] = "fixed"


def trade_two_classes(model: ModelProto) -> None:
    def swap(bias: np.ndarray) -> np.ndarray:
        by_class = bias.reshape(9, 3, *bias.shape[1:])
        return by_class[:, [1, 0, 2]].reshape(bias.shape)

    for part in ("bias", "weight"):
        edit(model, f"detector.head.classification_head.cls_logits.{part}", swap)


def take_the_first_image_for_all(model: ModelProto) -> None:
    """A fault that no batch of one shows."""
    zero = numpy_helper.from_array(np.array(0), "zero")
    model.graph.initializer.append(zero)
    for one in model.graph.node:
        if one.op_type == "Conv" and one.input[0] == "images":
            one.input[0] = "first"
    take = onnx.helper.make_node("Gather", ["images", "zero_row"], ["one_image"], axis=0)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero_row"))
    shape = onnx.helper.make_node("Shape", ["images"], ["images_shape"])
    expand = onnx.helper.make_node("Expand", ["one_image", "images_shape"], ["first"])
    for place, made in enumerate((take, shape, expand)):
        model.graph.node.insert(place, made)


TAMPERED = [
    shift_class_scores,
    shift_one_class_of_one_anchor,
    shift_boxes,
    change_a_backbone_weight,
    cut_scores_in_nms,
    keep_three_boxes_a_class,
    ignore_the_iou_given,
    ignore_the_thresholds_given,
    trade_two_classes,
    take_the_first_image_for_all,
]


@pytest.mark.parametrize("how", TAMPERED)
def test_a_changed_graph_fails(
    tampered: Tamper,
    checkpoint_path: Path,
    samples: list[Sample],
    how: Callable[[ModelProto], None],
) -> None:
    report = verify(tampered(how), checkpoint_path, samples, batch_sizes=[3])
    assert not report.ok
    assert "cloud_" in report.problems[0]
    assert report.table().endswith("FAILED")


def test_a_graph_that_does_not_run_is_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def keep_fewer_candidates(model: ModelProto) -> None:
        edit(model, node(model, "TopK").input[1], lambda count: count // 8)

    (problem,) = verify(tampered(keep_fewer_candidates), checkpoint_path, samples).problems
    assert problem.startswith("onnxruntime fails on a batch of 1: ")


def test_a_graph_that_does_not_load_is_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def call_the_unknown(model: ModelProto) -> None:
        node(model, "Sigmoid").op_type = "Sigmold"

    (problem,) = verify(tampered(call_the_unknown), checkpoint_path, samples).problems
    assert problem.startswith("onnxruntime refuses the file: ")


def test_a_fault_between_images_of_a_batch_shows_in_batches_only(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    path = tampered(take_the_first_image_for_all)
    assert verify(path, checkpoint_path, samples, batch_sizes=[1]).ok
    assert not verify(path, checkpoint_path, samples, batch_sizes=[3]).ok


@pytest.mark.parametrize("name", [THRESHOLDS_INPUT, IOU_INPUT])
def test_thresholds_that_are_not_the_cards_are_refused(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample], name: str
) -> None:
    path = tampered(lambda model: edit(model, name, add_to(0, 0.125)))
    with pytest.raises(CardError, match="threshold is"):
        verify(path, checkpoint_path, samples)


def test_thresholds_changed_in_card_and_graph_together_are_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def both(model: ModelProto) -> None:
        entries = card_of(model).thresholds
        changed = entries[0].model_copy(update={"threshold": 0.125})
        edit_card(model, thresholds=[changed, *entries[1:]])
        edit(model, THRESHOLDS_INPUT, lambda own: np.array([0.125, *own[1:]], np.float32))

    (problem,) = verify(tampered(both), checkpoint_path, samples).problems
    assert problem.startswith("the card's thresholds is [")
    assert '"threshold": 0.125' in problem


def test_another_preprocessing_is_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def darker(model: ModelProto) -> None:
        frame = card_of(model).preprocessing.model_copy(update={"pad_value": 0})
        edit_card(model, preprocessing=frame)

    (problem,) = verify(tampered(darker), checkpoint_path, samples).problems
    assert problem.startswith("the card's preprocessing is")


def test_names_in_another_order_are_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def rename(model: ModelProto) -> None:
        card = card_of(model)
        names = ["green", "red", "blue"]
        entries = [
            entry.model_copy(update={"name": name})
            for name, entry in zip(names, card.thresholds, strict=True)
        ]
        edit_card(model, class_names=names, thresholds=entries)

    report = verify(tampered(rename), checkpoint_path, samples)
    assert any(problem.startswith("the card's class_names is") for problem in report.problems)
    assert report.runs == {}


def test_an_unknown_policy_is_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    path = tampered(lambda model: edit_card(model, threshold_policy="a guess"))
    (problem,) = verify(path, checkpoint_path, samples).problems
    assert "unknown policy 'a guess'" in problem


def saved(checkpoint: Checkpoint, tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "another.pt"
    replace(checkpoint, **changes).save(path)
    return path


def test_another_checkpoint_of_the_same_weights_is_told(
    detector_path: Path, checkpoint: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    other = saved(checkpoint, tmp_path, training={**checkpoint.training, "step": 1001})
    report = verify(detector_path, other, samples, images=2)
    assert "the file was exported from another checkpoint" in report.problems[0]
    assert report.problems[1].startswith("the card's training is")
    assert len(report.problems) == 2
    assert report.total().mismatches == []


def test_another_checkpoint_of_other_weights_differs_in_detections_too(
    detector_path: Path, checkpoint: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    key = "head.classification_head.cls_logits.bias"
    other = saved(checkpoint, tmp_path, model={**checkpoint.model, key: checkpoint.model[key] + 1})
    report = verify(detector_path, other, samples, images=2)
    assert "the file was exported from another checkpoint" in report.problems[0]
    assert report.total().mismatches != []


def test_a_checkpoint_of_another_input_size_is_told_and_not_run(
    detector_path: Path, checkpoint: Checkpoint, samples: list[Sample], tmp_path: Path
) -> None:
    config: DetectorConfig = replace(checkpoint.config, image_size=(96, 64))
    report = verify(detector_path, saved(checkpoint, tmp_path, config=config), samples)
    assert any(problem.startswith("the card's preprocessing is") for problem in report.problems)
    assert report.runs == {}
    assert report.table().endswith("FAILED")


def test_more_borderline_cases_than_rounding_makes_are_a_failure() -> None:
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


def test_nothing_compared_is_not_a_success() -> None:
    report = VerifyReport(1, ("cat",))
    report.runs["onnxruntime", "own", 1] = Comparison(np.array([0]))
    report.conclude()
    assert report.problems == [
        "onnxruntime: neither side detects anything in these images; nothing was compared"
    ]


def test_many_mismatches_are_counted_not_listed() -> None:
    report = VerifyReport(1, ("cat",))
    texts = [f"mismatch {i}" for i in range(37)]
    report.runs["onnxruntime", "own", 1] = Comparison(np.array([5]), mismatches=texts)
    report.conclude()
    assert report.problems[0] == "onnxruntime, own, batch 1: mismatch 0"
    assert report.problems[-1] == "onnxruntime, own, batch 1: 27 more like these"
    assert len(report.problems) == 11


def test_a_tighter_tolerance_is_one_to_ask_for(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
    impossible = Tolerance(box=1e-9, score=1e-12)
    report = verify(detector_path, checkpoint_path, samples, images=2, tolerance=impossible)
    assert not report.ok


@pytest.mark.parametrize("images", [0, -1])
def test_no_images_are_an_error(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample], images: int
) -> None:
    with pytest.raises(ValueError, match=rf"no images to compare on \(11 given, {images} asked"):
        verify(detector_path, checkpoint_path, samples, images=images)


def test_slow_runtimes_need_an_image(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample]
) -> None:
    with pytest.raises(ValueError, match="slow runtimes need an image or more, got 0"):
        verify(detector_path, checkpoint_path, samples, slow_images=0)


@pytest.mark.parametrize("sizes", [[], [0], [1, 65]])
def test_batch_sizes_lie_in_1_to_64(
    detector_path: Path, checkpoint_path: Path, samples: list[Sample], sizes: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"batch sizes must lie in 1\.\.64"):
        verify(detector_path, checkpoint_path, samples, batch_sizes=sizes)
