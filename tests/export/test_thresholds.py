from __future__ import annotations

import warnings
from dataclasses import asdict, replace

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from onnx import numpy_helper

from export.card import IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT, DetectorCard
from export.file import read_detector
from export.runtimes import open_session
from export.thresholds import rewrite_thresholds, set_thresholds
from export.verify.verify import card_problems
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics, ClassThresholds, ThresholdWarning, as_float32


@pytest.fixture(scope="module")
def card(detector_path):
    return read_detector(detector_path).card


@given(threshold=st.floats(0, 1))
@example(threshold=0.0)
@example(threshold=1.0)
@example(threshold=0.005)  # an edge of the histograms, and its neighbours
@example(threshold=float(np.nextafter(np.float32(0.615), np.float32(0))))
@example(threshold=0.615)
@example(threshold=float(np.nextafter(np.float32(0.615), np.float32(1))))
def test_the_evidence_is_what_a_policy_would_give(
    card: DetectorCard, checkpoint: Checkpoint, threshold: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        chosen = ClassThresholds.from_statistics(checkpoint.statistics, f"fixed={threshold!r}")
    by_hand = set_thresholds(card, every=threshold).thresholds
    for ours, theirs in zip(by_hand, chosen, strict=True):
        assert replace(ours, source="policy") == replace(theirs, source="policy")


def test_a_class_without_evidence_has_none():
    statistics = ClassStatistics(
        ("red", "green"),
        anchors=1,
        positives=[1, 1],
        ground_truths=[0, 4],
        positive_scores=[[0, 0], [1, 0]],
        negative_scores=[[0, 0], [1, 0]],
    )
    assert statistics.precision_recall_at(0, 0.0) == (None, None)
    assert statistics.precision_recall_at(1, 0.5) == (None, 0.0)
    assert statistics.precision_recall_at(1, 0.0) == (0.5, 0.25)
    without_bins = replace(statistics, positive_scores=[[], []], negative_scores=[[], []])
    assert without_bins.precision_recall_at(1, 0.0) == (None, 0.0)


def test_only_what_is_named_changes(card):
    changed = set_thresholds(card, {"green": 0.4})
    before, after = ([asdict(e) for e in one.thresholds] for one in (card, changed))
    assert (after[0], after[2]) == (before[0], before[2])
    assert (after[1]["threshold"], after[1]["source"]) == (as_float32(0.4), "manual")
    assert after[1]["support"] == before[1]["support"] > 0
    rest = {"thresholds", "format_version"}
    assert changed.model_dump(exclude=rest) == card.model_dump(exclude=rest)
    assert DetectorCard.from_json(changed.to_json()) == changed


def test_a_class_named_wins_over_all(card):
    changed = set_thresholds(card, {"blue": 0.75}, every=0.25, iou_threshold=0.6)
    assert changed.class_thresholds == [0.25, 0.25, 0.75]
    assert [entry.source for entry in changed.thresholds] == ["manual"] * 3
    assert changed.iou_threshold == as_float32(0.6)


def test_a_card_of_the_first_format_becomes_one_of_the_newest(card):
    old = card.model_copy(update={"format_version": 1})
    assert set_thresholds(old, every=0.5).format_version == 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "nothing to set"),
        ({"classes": {}}, "nothing to set"),
        ({"classes": {"pink": 0.5}}, "unknown class 'pink'; known: red, green, blue"),
        ({"classes": {"red": 1.5}}, r"class 'red' must lie in \[0, 1\], got 1.5"),
        ({"classes": {"red": float("nan")}}, "class 'red' must lie in .*, got nan"),
        ({"every": -0.5}, "all classes must lie in .*, got -0.5"),
        ({"every": 0.5, "iou_threshold": 2.0}, "iou_threshold must lie in .*, got 2.0"),
    ],
)
def test_what_cannot_be_set_is_named(card, wanted, message):
    with pytest.raises(ValueError, match=message):
        set_thresholds(card, **wanted)


def test_the_new_file_answers_by_its_new_thresholds(detector_path, tmp_path):
    path = tmp_path / "new.onnx"
    before = detector_path.read_bytes()
    card = rewrite_thresholds(detector_path, path, {"red": 0.2, "blue": 0.9}, iou_threshold=0.7)
    assert detector_path.read_bytes() == before
    assert read_detector(path).card == card
    images = np.random.default_rng(0).normal(size=(2, 3, 64, 96)).astype(np.float32)
    # What a call overrides in the old file is what the new one does by itself.
    feeds = {
        THRESHOLDS_INPUT: np.array(card.class_thresholds, np.float32),
        IOU_INPUT: np.array([0.7], np.float32),
    }
    wanted = open_session(before).run(list(OUTPUTS), {"images": images, **feeds})
    found = open_session(path.read_bytes()).run(list(OUTPUTS), {"images": images})
    assert found[3].min() > 10
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_nothing_but_card_and_defaults_changes(detector_path, tmp_path):
    path = tmp_path / "new.onnx"
    rewrite_thresholds(detector_path, path, every=0.5, iou_threshold=0.7)
    models = [onnx.load(detector_path), onnx.load(path)]
    for model in models:
        values = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, value in ((THRESHOLDS_INPUT, [0.1, 0.2, 0.3]), (IOU_INPUT, [0.4])):
            values[name].CopyFrom(numpy_helper.from_array(np.array(value, np.float32), name))
        del model.metadata_props[:]
    assert models[0] == models[1]


def test_the_same_wish_gives_the_same_bytes(detector_path, tmp_path):
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        rewrite_thresholds(detector_path, path, {"red": 0.1}, every=0.3)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    rewrite_thresholds(paths[0], paths[0], {"red": 0.1}, every=0.3)  # once more, in place
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_file_set_by_hand_still_verifies(card, checkpoint):
    sha256 = card.training.checkpoint_sha256
    changed = set_thresholds(card, {"green": 0.4}, iou_threshold=0.6)
    assert card_problems(changed, checkpoint, sha256) == []
    flattered = replace(changed.thresholds[1], precision=1.0)
    thresholds = [changed.thresholds[0], flattered, changed.thresholds[2]]
    (problem,) = card_problems(
        changed.model_copy(update={"thresholds": thresholds}), checkpoint, sha256
    )
    assert problem.startswith("the card's thresholds is")


def test_an_unknown_class_set_by_hand_does_not_verify(card, checkpoint):
    odd = [replace(entry, source="manual") for entry in card.thresholds]
    odd[0] = replace(odd[0], name="pink")
    (problem,) = card_problems(
        card.model_copy(update={"thresholds": odd}), checkpoint, card.training.checkpoint_sha256
    )
    assert "unknown class 'pink'" in problem


def test_a_folder_is_not_a_file_to_write(detector_path, tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file"):
        rewrite_thresholds(detector_path, tmp_path, every=0.5)
