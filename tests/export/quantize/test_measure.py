from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import export.quantize.tradeoff
from export.card import CARD_KEY, INPUT, DetectorCard
from export.quantize.tradeoff import ROUNDS, detect_all, measure, prepared, race, spread
from ghm_triton.detection.data import DetectionDataset, Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import detect, mean_average_precision, torch_predictor
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def content(detector_path: Path) -> bytes:
    return detector_path.read_bytes()


def test_the_precision_is_that_of_the_detector(
    content: bytes,
    checkpoint: Checkpoint,
    clouds: DetectionDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.0)
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


def test_nothing_is_kept_back_when_precision_is_measured(
    content: bytes, config: DetectorConfig, clouds: DetectionDataset
) -> None:
    (card,) = (
        p.value for p in onnx.load_model_from_string(content).metadata_props if p.key == CARD_KEY
    )
    found = detect_all(content, config, clouds)
    assert [sample.source for sample, _ in found] == [clouds[i].source for i in range(len(clouds))]
    lowest = min(float(detections.scores.min()) for _, detections in found)
    assert 0.005 <= lowest < 0.06
    assert min(DetectorCard.from_json(card).class_thresholds) > 0.1


def test_images_without_boxes_measure_nothing(
    content: bytes,
    config: DetectorConfig,
    samples: list[Sample],
    clouds: DetectionDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export.quantize.tradeoff, "SECONDS", 0.0)
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


def test_files_take_turns_on_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_images_are_prepared_as_for_detection(
    clouds: DetectionDataset, config: DetectorConfig
) -> None:
    (image,) = prepared(clouds, config, [3])
    assert (image.shape, image.dtype) == ((3, 64, 96), np.float32)
    assert np.array_equal(image, Letterbox(config)(clouds[3].image)[0].numpy())


@pytest.mark.parametrize(
    ("length", "count", "chosen"), [(10, 3, [0, 3, 6]), (3, 10, [0, 1, 2]), (7, 7, list(range(7)))]
)
def test_a_spread_is_even(length: int, count: int, chosen: list[int]) -> None:
    assert spread(length, count) == chosen
