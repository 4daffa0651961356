from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import export.quantize.tradeoff
from export.card import THRESHOLDS_INPUT, DetectorCard
from export.file import read_detector
from export.quantize.convert import Int8Recipe
from export.quantize.tradeoff import (
    AccuracyLossError,
    Splits,
    Tradeoff,
    detect_all,
    export_quantized,
    open_splits,
    prepared,
)
from ghm_triton.detection.data import DetectionDataset, Sample
from ghm_triton.detection.evaluate import mean_average_precision, observe
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics, ClassThresholds, ThresholdWarning

ROUGH = Int8Recipe(coverage=60.0)  # cuts off so much that precision falls


@pytest.fixture(scope="module")
def splits(clouds: DetectionDataset, config: DetectorConfig) -> Splits:
    def split(name: str, rows: range) -> DetectionDataset:
        return type(clouds)([clouds[i] for i in rows], config.class_names, name)

    return Splits(split("learnt", range(6)), split("held", range(3, 11)), split("last", range(11)))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch, detector_path: Path) -> None:
    """One call a round, and a graph that was exported before: its thresholds are put in again."""
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.0)

    def build(detector: object, thresholds: list[float], iou: float) -> ModelProto:
        graph = onnx.load(detector_path)
        del graph.metadata_props[:]
        for tensor, values in zip(graph.graph.initializer[-2:], (thresholds, [iou]), strict=True):
            new = np.array(values, dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
        return graph

    monkeypatch.setattr(export.quantize.tradeoff, "build_graph", build)


Export = Callable[..., Tradeoff]


@pytest.fixture
def quantize(checkpoint_path: Path, tmp_path: Path, splits: Splits) -> Export:
    def run(precision: str, **options: Any) -> Tradeoff:
        chosen = {"max_drop": 100.0, **options}
        return export_quantized(
            checkpoint_path, tmp_path / "small.onnx", precision, splits, **chosen
        )

    return run


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_file_says_how_it_was_made_and_what_that_cost(
    quantize: Export, precision: str, tmp_path: Path, splits: Splits, config: DetectorConfig
) -> None:
    tradeoff = quantize(precision, images=4)
    file = read_detector(tmp_path / "small.onnx")
    assert file.card == tradeoff.card
    made = file.card.quantization
    assert made is not None
    assert made.precision == tradeoff.after.precision == precision
    calibrated = (made.calibration_data, made.calibration_split, made.calibration_images)
    assert calibrated == (("clouds", "learnt", 4) if precision == "int8" else (None, None, 0))
    assert (made.test_data, made.test_split, made.test_images) == ("clouds", "last", 11)
    # What is told of it is true of it.
    found = detect_all(file.content, config, splits.test)
    quality = mean_average_precision(config.class_names, found)
    assert tradeoff.after.quality == quality
    assert made.ap_after == round(quality.ap, 4)
    assert made.ap_before == round(tradeoff.before.quality.ap, 4)
    assert tradeoff.drop == pytest.approx(100 * (tradeoff.before.quality.ap - quality.ap))
    assert 0.1 < made.ap_after < 1.0
    assert tradeoff.after.size == len(file.content) < tradeoff.before.size
    assert tradeoff.before.precision == "float32"
    faster = tradeoff.before.milliseconds / tradeoff.after.milliseconds
    assert tradeoff.speedup == pytest.approx(faster)


def test_the_thresholds_fit_the_scores_of_the_file(
    quantize: Export, tmp_path: Path, splits: Splits, checkpoint: Checkpoint
) -> None:
    # Statistics of its own make an export's thresholds; this one's scores are another detector's.
    quantize("int8", recipe=ROUGH, policy="precision=0.6", iou_threshold=0.4)
    file = read_detector(tmp_path / "small.onnx")
    found = detect_all(file.content, checkpoint.config, splits.held_out)
    statistics = observe(copy.deepcopy(checkpoint.statistics), found)
    assert file.card.statistics.to_dict() == statistics.to_dict()
    assert not np.array_equal(statistics.positive_scores, checkpoint.statistics.positive_scores)
    assert statistics.anchors == checkpoint.statistics.anchors  # counted in training, and kept
    chosen = ClassThresholds.from_statistics(statistics, "precision=0.6")
    assert file.card.class_thresholds == [entry.threshold for entry in chosen]
    assert [e.precision for e in file.card.thresholds] == [e.precision for e in chosen]
    before = ClassThresholds.from_statistics(checkpoint.statistics, "precision=0.6")
    assert file.card.class_thresholds != [entry.threshold for entry in before]
    graph = onnx.load_model_from_string(file.content).graph
    (held,) = (tensor for tensor in graph.initializer if tensor.name == THRESHOLDS_INPUT)
    assert numpy_helper.to_array(held).tolist() == file.card.class_thresholds
    assert file.card.iou_threshold == np.float32(0.4)


def test_calibration_sees_images_of_its_split_evenly(
    quantize: Export, splits: Splits, config: DetectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    to_int8 = export.quantize.tradeoff.to_int8

    def note(model: ModelProto, images: Any, recipe: Int8Recipe) -> ModelProto:
        seen.extend(images)
        return to_int8(model, seen, recipe)

    monkeypatch.setattr(export.quantize.tradeoff, "to_int8", note)
    tradeoff = quantize("int8", images=3)
    assert np.array_equal(seen, prepared(splits.calibration, config, [0, 2, 4]))
    assert tradeoff.card.quantization.calibration_images == 3
    seen.clear()
    assert quantize("int8", images=99).card.quantization.calibration_images == 6


def test_a_file_that_loses_too_much_is_not_written(
    quantize: Export, tmp_path: Path, checkpoint_path: Path, splits: Splits
) -> None:
    old = tmp_path / "small.onnx"
    old.write_bytes(b"the old file")
    with pytest.raises(AccuracyLossError) as refused:
        quantize("int8", recipe=ROUGH, max_drop=1.0)
    tradeoff = refused.value.tradeoff
    assert tradeoff.drop > 1.0
    message = str(refused.value)
    before, after = tradeoff.before.quality.ap, tradeoff.after.quality.ap
    assert f"int8 loses {tradeoff.drop:.2f} points of AP ({before:.4f} to {after:.4f})" in message
    assert "more than the 1 allowed; nothing was written" in message
    assert len(message.splitlines()) == 1
    assert old.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [old]

    # Exactly as much as is allowed is not too much; and force asks no questions.
    assert quantize("int8", recipe=ROUGH, max_drop=tradeoff.drop).drop == tradeoff.drop
    assert read_detector(old).card.quantization.ap_after == round(after, 4)
    old.unlink()
    quantize("int8", recipe=ROUGH, max_drop=0.0, force=True)
    assert read_detector(old).card.quantization.ap_after == round(after, 4)


def test_both_inputs(quantize: Export, tmp_path: Path) -> None:
    tradeoff = quantize("int8", images=1, input_type="both")
    plain, raw = (read_detector(tmp_path / f"small{kind}.onnx").card for kind in ("", ".uint8"))
    assert plain == tradeoff.card
    assert (plain.input, raw.input) == ("float32", "uint8")
    assert raw.quantization == plain.quantization
    assert raw.class_thresholds == plain.class_thresholds


def test_only_the_thresholds_that_are_kept_are_warned_of(
    checkpoint: Checkpoint, splits: Splits, tmp_path: Path
) -> None:
    poor = copy.deepcopy(checkpoint)
    poor.statistics.positives[1] = 0
    poor.save(tmp_path / "poor.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        export_quantized(
            tmp_path / "poor.pt", tmp_path / "poor.onnx", "fp16", splits, max_drop=100.0
        )
    assert len([w for w in caught if issubclass(w.category, ThresholdWarning)]) == 1


def test_the_table_shows_both_and_the_worst_class(quantize: Export) -> None:
    tradeoff = quantize("int8", images=2)
    where, head, _, before, after, change, worst, note = tradeoff.table().splitlines()
    assert where == ("11 images of clouds, split last; calibrated on 2 of clouds, split learnt")
    assert head.split() == ["AP", "AP50", "size", "latency"]
    quality, size = tradeoff.before.quality, tradeoff.before.size / 1e6
    assert before.split()[:5] == [
        "float32", f"{quality.ap:.3f}", f"{quality.ap50:.3f}", f"{size:.2f}", "MB",
    ]  # fmt: skip
    assert after.split()[1] == f"{tradeoff.after.quality.ap:.3f}"
    assert change.split()[1] == f"{-tradeoff.drop:+.2f}"
    assert change.endswith(f"{tradeoff.speedup:.2f}x as fast")
    loss = {
        name: tradeoff.before.quality.per_class[name][0] - ap
        for name, (ap, _) in tradeoff.after.quality.per_class.items()
    }
    assert worst.startswith(f"class that loses most: {max(loss, key=loss.__getitem__)}, AP ")
    assert "one thread" in note


def test_a_class_without_boxes_is_not_the_worst(quantize: Export) -> None:
    tradeoff = quantize("fp16")
    for measured in (tradeoff.before, tradeoff.after):
        measured.quality.per_class["red"] = (float("nan"), float("nan"))
    assert "class that loses most: red" not in tradeoff.table()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, "precision must be one of int8, fp16, got 'int4'"),
        ({"precision": "int8", "images": 0}, "images must be at least 1, got 0"),
        ({"precision": "int8", "max_drop": -1.0}, "at least 0 points, got -1.0"),
        ({"precision": "int8", "max_drop": float("nan")}, "at least 0 points, got nan"),
        ({"precision": "int8", "policy": "best"}, "unknown policy 'best'"),
        ({"precision": "int8", "input_type": "int7"}, "input_type must be one of"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    quantize: Export, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        quantize(**options)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_those_of_the_training(checkpoint: Checkpoint) -> None:
    digits = DetectorConfig(tuple("0123456789"), (64, 64))
    training = {
        **checkpoint.training,
        "data": "digits:images=7,held_out_images=5",
        "train_split": "val",
        "val_split": "train",
    }
    saved = Checkpoint(digits, {}, ClassStatistics(digits.class_names), training)
    splits = open_splits(saved)
    opened = (splits.calibration, splits.held_out, splits.test)
    assert [dataset.split for dataset in opened] == ["val", "train", "test"]
    assert [len(dataset) for dataset in opened] == [5, 7, 5]
    others = open_splits(
        saved, "digits:images=3,held_out_images=2", calibration="train", test="val"
    )
    assert [len(data) for data in (others.calibration, others.held_out, others.test)] == [3, 3, 2]
    other_classes = replace(saved, config=replace(digits, class_names=("0", "1")))
    with pytest.raises(ValueError, match="the classes are 0, 1, 2"):
        open_splits(other_classes)


def test_an_older_card_has_no_quantization(detector_path: Path) -> None:
    card = json.loads(read_detector(detector_path).card.to_json())
    assert card.pop("quantization") is None
    assert DetectorCard.from_json(json.dumps(card)).quantization is None


def test_a_card_without_quantization_has_no_table(quantize: Export, samples: list[Sample]) -> None:
    tradeoff = quantize("fp16")
    blank = tradeoff.card.model_copy(update={"quantization": None})
    with pytest.raises(ValueError, match="is not quantised"):
        replace(tradeoff, card=blank).table()
