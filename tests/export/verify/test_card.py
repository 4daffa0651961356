"""Cards that are not what the checkpoint gives, and checkpoints that are others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from export.card import CARD_KEY, IOU_INPUT, THRESHOLDS_INPUT, CardError, DetectorCard
from export.file import set_default
from export.verify.verify import verify
from ghm_triton.detection.data import Sample
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.checkpoint import Checkpoint

Tamper = Callable[[Callable[[ModelProto], None]], Path]


def edit_card(model: ModelProto, **fields: Any) -> None:
    (entry,) = (entry for entry in model.metadata_props if entry.key == CARD_KEY)
    entry.value = DetectorCard.from_json(entry.value).model_copy(update=fields).to_json()


def card_of(model: ModelProto) -> DetectorCard:
    return DetectorCard.from_json(model.metadata_props[0].value)


@pytest.mark.parametrize(("name", "length"), [(THRESHOLDS_INPUT, 3), (IOU_INPUT, 1)])
def test_thresholds_that_are_not_the_cards_are_refused(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample], name: str, length: int
) -> None:
    path = tampered(lambda model: set_default(model, name, [0.125] * length))
    with pytest.raises(CardError, match="threshold is"):
        verify(path, checkpoint_path, samples)


@pytest.mark.slow
def test_thresholds_changed_in_card_and_graph_together_are_told(
    tampered: Tamper, checkpoint_path: Path, samples: list[Sample]
) -> None:
    def both(model: ModelProto) -> None:
        entries = card_of(model).thresholds
        changed = replace(entries[0], threshold=0.125)
        thresholds = [changed, *entries[1:]]
        edit_card(model, thresholds=thresholds)
        set_default(model, THRESHOLDS_INPUT, [entry.threshold for entry in thresholds])

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
            replace(entry, name=name) for name, entry in zip(names, card.thresholds, strict=True)
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


@pytest.mark.slow
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
    assert not any("fails on a batch" in problem for problem in report.problems)
    assert report.table().endswith("FAILED")
