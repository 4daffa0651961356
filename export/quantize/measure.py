"""What a detector's file is worth: its average precision, its size, and the time it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import Tensor

from export.card import INPUT, OUTPUTS, THRESHOLDS_INPUT
from ghm_triton.detection.data import DetectionDataset, Sample
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import (
    Detections,
    MeanAveragePrecision,
    detect,
    mean_average_precision,
)
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.evidence import SCORE_FLOOR

BATCH = 4  # images in memory at a time, with all that is computed of them
TIMED_IMAGES = 8  # suppression takes as long as there is much to suppress
ROUNDS = 15
SECONDS = 4.0  # for each file that is timed, about

Image = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """One file.

    Attributes:
        precision: What its core computes with.
        quality: Its average precision.
        size: Bytes.
        milliseconds: Median latency of one image on one thread of the CPU.
    """

    precision: str
    quality: MeanAveragePrecision
    size: int
    milliseconds: float


def load(content: bytes, threads: int = 0) -> Any:
    """A detector's file in onnxruntime, on the CPU.

    Args:
        content: The file.
        threads: Of one inference; 0 for one a core.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the thresholds can be overridden: they shall
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def detect_all(
    content: bytes, config: DetectorConfig, dataset: DetectionDataset
) -> list[tuple[Sample, Detections]]:
    """All that a file detects in a data set, however low its score; NMS at the file's default."""
    session = load(content)
    floor = np.full(config.num_classes, SCORE_FLOOR, dtype=np.float32)

    def predict(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        feeds = {INPUT: images.numpy(), THRESHOLDS_INPUT: floor}
        boxes, scores, labels, counts = map(torch.from_numpy, session.run(list(OUTPUTS), feeds))
        return boxes, scores, labels, counts

    return list(detect(predict, config, dataset, batch_size=BATCH))


def measure(
    files: dict[str, bytes], config: DetectorConfig, dataset: DetectionDataset
) -> list[Measured]:
    """Measure files of one detector, side by side.

    Args:
        files: The files by the precision of their cores; they take float32 images.
        config: The detector's.
        dataset: Images with boxes that it has not learnt from.

    Raises:
        ValueError: The data set has no boxes.
    """
    chosen = spread(len(dataset), TIMED_IMAGES)
    milliseconds = race(list(files.values()), prepared(dataset, config, chosen))
    measured = []
    for (precision, content), median in zip(files.items(), milliseconds, strict=True):
        results = detect_all(content, config, dataset)
        quality = mean_average_precision(config.class_names, results)
        if np.isnan(quality.ap):
            raise ValueError(
                f"{dataset.name}, split {dataset.split!r}, has no boxes to measure precision by"
            )
        measured.append(Measured(precision, quality, len(content), median))
    return measured


def race(files: Sequence[bytes], images: Sequence[Image]) -> list[float]:
    """Median latency of each file in milliseconds: one image, one thread, in turns.

    Args:
        files: The files.
        images: Float32 `[3, H, W]`; the calls take one after the other.
    """
    sessions = [load(content, threads=1) for content in files]
    batches = [image[None] for image in images]
    slowest = max(max(_clock(session, batches[:1] * 2)) for session in sessions) / 1000
    calls = max(1, round(SECONDS / ROUNDS / slowest))
    supply = [cycle(batches) for _ in sessions]  # each sees the same images in the same order
    taken: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        for session, images_left, times in zip(sessions, supply, taken, strict=True):
            times += _clock(session, [next(images_left) for _ in range(calls)])
    return [statistics.median(times) for times in taken]


def _clock(session: Any, batches: Sequence[Image]) -> list[float]:
    times = []
    for batch in batches:
        start = time.perf_counter()
        session.run(list(OUTPUTS), {INPUT: batch})
        times.append((time.perf_counter() - start) * 1000)
    return times


def prepared(
    dataset: DetectionDataset, config: DetectorConfig, indices: Sequence[int]
) -> list[Image]:
    """Images of a data set as the detector takes them, float32 `[3, H, W]`."""
    letterbox = Letterbox(config)
    return [letterbox(dataset[i].image)[0].numpy() for i in indices]


def spread(length: int, count: int) -> list[int]:
    """Up to `count` indices of `length`, evenly spread.

    Example:
        >>> spread(10, 3)
        [0, 3, 6]
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]
