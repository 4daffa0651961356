"""Files and checkpoints that differ: the verifier has to see each difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper

from export.card import CARD_KEY, IOU_INPUT, THRESHOLDS_INPUT, CardError, DetectorCard
from export.file import set_default
from export.verify.verify import verify

CLASSIFIER = "detector.head.classification_head.cls_logits"


def edit(model: ModelProto, name: str, how: Callable[[np.ndarray], Any]) -> None:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = np.asarray(how(numpy_helper.to_array(tensor).copy()))
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def add(model: ModelProto, name: str, values: Any, dtype: type | None = None) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.array(values, dtype), name))
    return name


def node(model: ModelProto, kind: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.op_type == kind)


def shift_class_scores(model: ModelProto) -> None:
    edit(model, f"{CLASSIFIER}.bias", lambda bias: bias + 0.002)


def shift_one_class_of_one_anchor(model: ModelProto) -> None:
    # Predictors are 9 anchors x 3 classes: anchor 4, class 'blue'.
    edit(
        model,
        f"{CLASSIFIER}.bias",
        lambda bias: bias + np.float32(0.01) * (np.arange(27) == 4 * 3 + 2),
    )


def shift_boxes(model: ModelProto) -> None:
    edit(model, "detector.head.regression_head.bbox_reg.bias", lambda bias: bias + 0.01)


def change_a_backbone_weight(model: ModelProto) -> None:
    edit(model, "detector.backbone.stem.0.0.weight", lambda weight: weight * 1.01)


def cut_scores_in_nms(model: ModelProto) -> None:
    edit(model, node(model, "NonMaxSuppression").input[4], lambda _: np.array([0.5], np.float32))


def keep_three_boxes_of_a_class(model: ModelProto) -> None:
    node(model, "NonMaxSuppression").input[2] = add(model, "three", [3])


def ignore_the_iou_given(model: ModelProto) -> None:
    node(model, "NonMaxSuppression").input[3] = add(model, "fixed", [0.3], np.float32)


def ignore_the_thresholds_given(model: ModelProto) -> None:
    (own,) = (t for t in model.graph.initializer if t.name == THRESHOLDS_INPUT)
    node(model, "GreaterOrEqual").input[1] = add(model, "fixed", numpy_helper.to_array(own))


def trade_two_classes(model: ModelProto) -> None:
    def swap(bias: np.ndarray) -> np.ndarray:
        by_class = bias.reshape(9, 3, *bias.shape[1:])
        return by_class[:, [1, 0, 2]].reshape(bias.shape)

    for part in ("bias", "weight"):
        edit(model, f"{CLASSIFIER}.{part}", swap)


def take_the_first_image_for_all(model: ModelProto) -> None:
    """A fault that no batch of one shows."""
    for one in model.graph.node:
        if one.op_type == "Conv" and one.input[0] == "images":
            one.input[0] = "first"
    first = [
        helper.make_node("Gather", ["images", add(model, "row", [0])], ["one_image"], axis=0),
        helper.make_node("Shape", ["images"], ["images_shape"]),
        helper.make_node("Expand", ["one_image", "images_shape"], ["first"]),
    ]
    for place, made in enumerate(first):
        model.graph.node.insert(place, made)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        shift_one_class_of_one_anchor,
        shift_boxes,
        ignore_the_thresholds_given,
        take_the_first_image_for_all,
        shift_class_scores,
        change_a_backbone_weight,
        cut_scores_in_nms,
        keep_three_boxes_of_a_class,
        ignore_the_iou_given,
        trade_two_classes,
    ],
)
def test_a_changed_graph_fails(tampered, checkpoint_path, samples, fault):
    report = verify(tampered(fault), checkpoint_path, samples, batch_sizes=[3])
    assert not report.ok
    assert "cloud_" in report.problems[0]
    assert report.table().endswith("FAILED")


def keep_fewer_candidates(model: ModelProto) -> None:
    edit(model, node(model, "TopK").input[1], lambda count: count // 8)


def call_an_unknown_operator(model: ModelProto) -> None:
    node(model, "Sigmoid").op_type = "Sigmold"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (keep_fewer_candidates, "onnxruntime fails on a batch of 1: "),
        (call_an_unknown_operator, "onnxruntime refuses the file: "),
    ],
)
def test_a_graph_that_does_not_load_or_run_is_a_problem(
    tampered, checkpoint_path, samples, fault, message
):
    (problem,) = verify(tampered(fault), checkpoint_path, samples).problems
    assert problem.startswith(message)


def test_a_fault_between_images_of_a_batch_shows_in_batches_only(
    tampered, checkpoint_path, samples
):
    path = tampered(take_the_first_image_for_all)
    assert verify(path, checkpoint_path, samples, batch_sizes=[1]).ok
    assert not verify(path, checkpoint_path, samples, batch_sizes=[3]).ok


def test_a_worse_file_has_a_lower_map(tampered, checkpoint_path, clouds):
    path = tampered(trade_two_classes)
    found = verify(path, checkpoint_path, clouds, images=4, batch_sizes=[3]).average_precision
    assert found["onnxruntime"].ap < found["checkpoint"].ap - 0.1


@pytest.mark.parametrize(("name", "length"), [(THRESHOLDS_INPUT, 3), (IOU_INPUT, 1)])
def test_thresholds_that_are_not_the_cards_are_refused(
    tampered, checkpoint_path, samples, name, length
):
    path = tampered(lambda model: set_default(model, name, [0.125] * length))
    with pytest.raises(CardError, match="threshold is"):
        verify(path, checkpoint_path, samples)


def change_card(model: ModelProto, how: Callable[[DetectorCard], dict[str, Any]]) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == CARD_KEY)
    card = DetectorCard.from_json(entry.value)
    entry.value = card.model_copy(update=how(card)).to_json()


def another_threshold(model: ModelProto) -> None:
    """In card and graph together."""

    def change(card: DetectorCard) -> dict[str, Any]:
        thresholds = [replace(card.thresholds[0], threshold=0.125), *card.thresholds[1:]]
        set_default(model, THRESHOLDS_INPUT, [entry.threshold for entry in thresholds])
        return {"thresholds": thresholds}

    change_card(model, change)


def darker_padding(model: ModelProto) -> None:
    change_card(
        model,
        lambda card: {
            "preprocessing": card.preprocessing.model_copy(update={"pad_value": 0}),
        },
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(
            another_threshold,
            'the card\'s thresholds is [{"ground_truths"',
            marks=pytest.mark.slow,
        ),
        (darker_padding, "the card's preprocessing is"),
        (
            lambda model: change_card(model, lambda _: {"threshold_policy": "a guess"}),
            "the checkpoint does not give such a card: unknown policy 'a guess'",
        ),
    ],
)
def test_a_card_that_the_checkpoint_does_not_yield_is_a_problem(
    tampered, checkpoint_path, samples, how, message
):
    (problem,) = verify(tampered(how), checkpoint_path, samples).problems
    assert problem.startswith(message)


def test_class_names_in_another_order_are_a_problem_and_nothing_is_run(
    tampered, checkpoint_path, samples
):
    names = ["green", "red", "blue"]

    def rename(card: DetectorCard) -> dict[str, Any]:
        pairs = zip(names, card.thresholds, strict=True)
        entries = [replace(entry, name=name) for name, entry in pairs]
        return {"class_names": names, "thresholds": entries}

    path = tampered(lambda model: change_card(model, rename))
    report = verify(path, checkpoint_path, samples)
    assert any(problem.startswith("the card's class_names is") for problem in report.problems)
    assert report.runs == {}


@pytest.fixture
def another(checkpoint, tmp_path):
    """Save the checkpoint with changes."""

    def save(**changes: Any):
        replace(checkpoint, **changes).save(tmp_path / "another.pt")
        return tmp_path / "another.pt"

    return save


def test_another_checkpoint_of_the_same_weights_is_a_problem(
    detector_path, checkpoint, samples, another
):
    other = another(training={**checkpoint.training, "step": 1001})
    report = verify(detector_path, other, samples, images=2)
    assert "the file was exported from another checkpoint" in report.problems[0]
    assert report.problems[1].startswith("the card's training is")
    assert len(report.problems) == 2
    assert report.total().mismatches == []


@pytest.mark.slow
def test_another_checkpoint_of_other_weights_differs_in_detections_too(
    detector_path, checkpoint, samples, another
):
    key = "head.classification_head.cls_logits.bias"
    other = another(model={**checkpoint.model, key: checkpoint.model[key] + 1})
    report = verify(detector_path, other, samples, images=2)
    assert "the file was exported from another checkpoint" in report.problems[0]
    assert report.total().mismatches != []


def test_a_checkpoint_of_another_input_size_is_a_problem_and_not_run(
    detector_path, checkpoint, samples, another
):
    other = another(config=replace(checkpoint.config, image_size=(96, 64)))
    report = verify(detector_path, other, samples)
    assert any(problem.startswith("the card's preprocessing is") for problem in report.problems)
    assert report.runs == {}
    assert not any("fails on a batch" in problem for problem in report.problems)
    assert report.table().endswith("FAILED")
