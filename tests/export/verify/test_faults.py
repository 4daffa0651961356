"""Files whose graph was changed: the verifier has to see each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from export.card import THRESHOLDS_INPUT
from export.verify.verify import Samples, verify
from ghm_triton.detection.data import Sample

Tamper = Callable[[Callable[[ModelProto], None]], Path]


def edit(model: ModelProto, name: str, how: Callable[[np.ndarray], Any]) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = np.asarray(how(numpy_helper.to_array(tensor).copy()))
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def node(model: ModelProto, kind: str, place: int = 0) -> onnx.NodeProto:
    return [one for one in model.graph.node if one.op_type == kind][place]


def add_to(place: int, amount: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] += amount
        return values

    return change


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
    shift_one_class_of_one_anchor,
    shift_boxes,
    ignore_the_thresholds_given,
    take_the_first_image_for_all,
    *(
        pytest.param(fault, marks=pytest.mark.slow)
        for fault in (
            shift_class_scores,
            change_a_backbone_weight,
            cut_scores_in_nms,
            keep_three_boxes_a_class,
            ignore_the_iou_given,
            trade_two_classes,
        )
    ),
]


@pytest.mark.slow
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


def test_a_worse_file_has_a_lower_map(
    tampered: Tamper, checkpoint_path: Path, clouds: Samples
) -> None:
    path = tampered(trade_two_classes)
    found = verify(path, checkpoint_path, clouds, images=4, batch_sizes=[3]).average_precision
    assert found["onnxruntime"].ap < found["checkpoint"].ap - 0.1
