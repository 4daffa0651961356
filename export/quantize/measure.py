"""Average precision, size and latency of a detector's file."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.card import INPUT, OUTPUTS, THRESHOLDS_INPUT
from export.session import open_session
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

BATCH = 4  # images in memory at a time, with all activations
TIMED_IMAGES = 8  # the time of NMS depends on the image
ROUNDS = 15
SECONDS = 4.0  # of timing per file, about

Image = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Measured:
    """Measurements of one file.

    Attributes:
        precision: Of its core: `float32`, `int8` or `fp16`.
        quality: Its average precision.
        size: Bytes.
        milliseconds: Median latency of one image on one thread of the CPU.
    """

    precision: str
    quality: MeanAveragePrecision
    size: int
    milliseconds: float


def detect_all(
    content: bytes, config: DetectorConfig, dataset: DetectionDataset
) -> list[tuple[Sample, Detections]]:
    """Detect with scores from `SCORE_FLOOR` on in a data set, with the file's own NMS threshold."""
    session = open_session(content)
    floor = np.full(config.num_classes, SCORE_FLOOR, dtype=np.float32)

    def predict(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        feeds = {INPUT: images.numpy(), THRESHOLDS_INPUT: floor}
        boxes, scores, labels, counts = map(torch.from_numpy, session.run(list(OUTPUTS), feeds))
        return boxes, scores, labels, counts

    return list(detect(predict, config, dataset, batch_size=BATCH))


def measure(
    files: dict[str, bytes], config: DetectorConfig, dataset: DetectionDataset
) -> list[Measured]:
    """Measure files of one detector.

    Args:
        files: The files by the precision of their cores; they take float32 images.
        config: The detector's configuration.
        dataset: Images with boxes that the detector was not trained on.

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
    """Measure the median latency of each file in milliseconds: one image, one thread, in turns.

    Args:
        files: The files.
        images: Float32 `[3, H, W]`, used in turn.
    """
    sessions = [open_session(content, threads=1) for content in files]
    batches = [image[None] for image in images]
    slowest = max(max(_clock(session, batches[:1] * 2)) for session in sessions) / 1000
    calls = max(1, round(SECONDS / ROUNDS / slowest))
    supply = cycle(batches)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(ROUNDS):
        group = list(islice(supply, calls))
        for session, measured in zip(sessions, times, strict=True):
            measured += _clock(session, group)
    return [statistics.median(measured) for measured in times]


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
    """Prepare images of a data set for the detector, float32 `[3, H, W]`."""
    letterbox = Letterbox(config)
    return [letterbox(dataset[i].image)[0].numpy() for i in indices]


def spread(length: int, count: int) -> list[int]:
    """Return up to `count` of `length` indices, evenly spread.

    Example:
        >>> spread(10, 3)
        [0, 3, 6]
    """
    count = min(length, count)
    return [i * length // count for i in range(count)]
