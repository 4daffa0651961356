from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import export.quantize.tradeoff
from export.card import CARD_KEY, INPUT, THRESHOLDS_INPUT, DetectorCard
from export.file import read_detector
from export.quantize.convert import Int8Recipe
from export.quantize.tradeoff import (
    ROUNDS,
    AccuracyLossError,
    Splits,
    Tradeoff,
    detect_all,
    export_quantized,
    measure,
    open_splits,
    prepared,
    race,
    spread,
)
from ghm_triton.detection.data import DetectionDataset
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import detect, mean_average_precision, observe, torch_predictor
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassStatistics, ClassThresholds, ThresholdWarning

ROUGH = Int8Recipe(coverage=60.0)  # cuts off so much that precision falls


@pytest.fixture(scope="module")
def splits(clouds, config):
    def split(name: str, rows: range) -> DetectionDataset:
        return type(clouds)([clouds[i] for i in rows], config.class_names, name)

    return Splits(split("learnt", range(6)), split("held", range(3, 11)), split("last", range(11)))


@pytest.fixture(autouse=True)
def _quickly(monkeypatch, detector_path):
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
def quantize(checkpoint_path, tmp_path, splits):
    def run(precision: str, **options: Any) -> Tradeoff:
        chosen = {"max_drop": 100.0, **options}
        return export_quantized(
            checkpoint_path, tmp_path / "small.onnx", precision, splits, **chosen
        )

    return run


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_the_file_says_how_it_was_made_and_what_that_cost(
    quantize, precision, tmp_path, splits, config
):
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


def test_the_thresholds_fit_the_scores_of_the_file(quantize, tmp_path, splits, checkpoint):
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


def test_calibration_sees_images_of_its_split_evenly(quantize, splits, config, monkeypatch):
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


def test_a_file_that_loses_too_much_is_not_written(quantize, tmp_path, checkpoint_path, splits):
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


def test_both_inputs(quantize, tmp_path):
    tradeoff = quantize("int8", images=1, input_type="both")
    plain, raw = (read_detector(tmp_path / f"small{kind}.onnx").card for kind in ("", ".uint8"))
    assert plain == tradeoff.card
    assert (plain.input, raw.input) == ("float32", "uint8")
    assert raw.quantization == plain.quantization
    assert raw.class_thresholds == plain.class_thresholds


def test_only_the_thresholds_that_are_kept_are_warned_of(checkpoint, splits, tmp_path):
    poor = copy.deepcopy(checkpoint)
    poor.statistics.positives[1] = 0
    poor.save(tmp_path / "poor.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        export_quantized(
            tmp_path / "poor.pt", tmp_path / "poor.onnx", "fp16", splits, max_drop=100.0
        )
    assert len([w for w in caught if issubclass(w.category, ThresholdWarning)]) == 1


def test_the_table_shows_both_and_the_worst_class(quantize):
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


def test_a_class_without_boxes_is_not_the_worst(quantize):
    tradeoff = quantize("fp16")
    for measured in (tradeoff.before, tradeoff.after):
        measured.quality.per_class["red"] = (float("nan"), float("nan"))
    assert "class that loses most: red" not in tradeoff.table()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"precision": "int4"}, "precision must be one of int8, fp16, got 'int4'"),
        ({"precision": "int8", "max_drop": -1.0}, "at least 0 points, got -1.0"),
        ({"precision": "int8", "input_type": "int7"}, "input_type must be one of"),
    ],
)
def test_what_cannot_be_is_said_at_once(quantize, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        quantize(**options)
    assert list(tmp_path.iterdir()) == []


def test_splits_are_those_of_the_training(checkpoint):
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


def test_a_card_without_quantization_has_no_table(quantize, samples):
    tradeoff = quantize("fp16")
    blank = tradeoff.card.model_copy(update={"quantization": None})
    with pytest.raises(ValueError, match="is not quantised"):
        replace(tradeoff, card=blank).table()


@pytest.fixture(scope="module")
def content(detector_path):
    return detector_path.read_bytes()


def test_the_precision_is_that_of_the_detector(content, checkpoint, clouds, monkeypatch):
    other = content + b""
    files = {"float32": content, "other": other}
    first, second = measure(files, checkpoint.config, clouds)
    assert (first.precision, second.precision) == ("float32", "other")
    assert first.quality == second.quality
    assert first.size == len(content)
    assert first.milliseconds > 0
    predict = torch_predictor(DeployedDetector(checkpoint.detector()))
    results = list(detect(predict, checkpoint.config, clouds))
    expected = mean_average_precision(checkpoint.config.class_names, results)
    assert 0.2 < expected.ap < 0.9
    # Runtimes round differently, which may swap two detections among hundreds.
    assert first.quality.ap == pytest.approx(expected.ap, abs=0.01)
    assert first.quality.images == len(clouds)


def test_nothing_is_kept_back_when_precision_is_measured(content, config, clouds):
    (card,) = (
        p.value for p in onnx.load_model_from_string(content).metadata_props if p.key == CARD_KEY
    )
    found = detect_all(content, config, clouds)
    assert [sample.source for sample, _ in found] == [clouds[i].source for i in range(len(clouds))]
    lowest = min(float(detections.scores.min()) for _, detections in found)
    assert 0.005 <= lowest < 0.06
    assert min(DetectorCard.from_json(card).class_thresholds) > 0.1


def test_images_without_boxes_measure_nothing(content, config, samples, clouds, monkeypatch):
    with pytest.raises(ValueError, match="clouds, split 'test', has no boxes"):
        measure({"float32": content}, config, type(clouds)(samples[:2], config.class_names, "test"))


class Stopwatch:
    """A clock that sessions move."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Runner:
    """A session that takes as long as it is told, and notes what it is asked."""

    def __init__(self, clock: Stopwatch, milliseconds: float, log: list[tuple[float, int]]) -> None:
        self.clock, self.milliseconds, self.log = clock, milliseconds, log

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> None:
        assert feeds[INPUT].shape == (1, 3, 2, 2)
        number = int(feeds[INPUT].max())
        self.log.append((self.milliseconds, number))
        self.clock.now += (self.milliseconds + 1000 * (number == 2)) / 1000


def test_files_take_turns_on_the_same_images(monkeypatch):
    clock, log, threads = Stopwatch(), [], []

    def load(content: bytes, threads_of_one: int) -> Runner:
        threads.append(threads_of_one)
        return Runner(clock, float(content), log)

    monkeypatch.setattr(export.quantize.tradeoff, "time", clock)
    monkeypatch.setattr(
        export.quantize.tradeoff, "open_session", lambda content, threads: load(content, threads)
    )
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.2 * ROUNDS)
    images = [np.full((3, 2, 2), number, np.float32) for number in range(5)]
    # One image in five takes a second more: the median does not see it.
    assert race([b"100", b"20"], images) == [pytest.approx(100), pytest.approx(20)]
    assert threads == [1, 1]
    turns = log[4:]  # after two calls of each, to warm up
    assert [slow for slow, _ in turns] == [100.0, 100.0, 20.0, 20.0] * ROUNDS
    seen = [[number for slow, number in turns if slow == each] for each in (100.0, 20.0)]
    assert seen[0] == seen[1] == [i % 5 for i in range(2 * ROUNDS)]


def test_images_are_prepared_as_for_detection(clouds, config):
    (image,) = prepared(clouds, config, [3])
    assert (image.shape, image.dtype) == ((3, 64, 96), np.float32)
    assert np.array_equal(image, Letterbox(config)(clouds[3].image)[0].numpy())


@pytest.mark.parametrize(
    ("length", "count", "chosen"), [(10, 3, [0, 3, 6]), (3, 10, [0, 1, 2]), (7, 7, list(range(7)))]
)
def test_a_spread_is_even(length, count, chosen):
    assert spread(length, count) == chosen
