"""Export with a quantized core, written only if it loses little average precision.

Also measures files: average precision, size and latency.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from export.card import (
    FORMAT_VERSION,
    INPUT,
    OUTPUTS,
    THRESHOLDS_INPUT,
    DetectorCard,
    Precision,
    QuantizationCard,
)
from export.detector import check_outputs, make_card, write_variants
from export.file import detector_bytes, set_default
from export.graph import build_graph
from export.quantize.convert import Image, Int8Recipe, to_float16, to_int8
from export.runtimes import open_session
from ghm_triton.detection.data import DetectionDataset, Sample, open_dataset
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.evaluate import (
    Detections,
    MeanAveragePrecision,
    detect,
    mean_average_precision,
    observe,
)
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.checkpoint import Checkpoint, sha256_of
from ghm_triton.evidence import SCORE_FLOOR, ThresholdWarning
from ghm_triton.tables import printable, table

PRECISIONS = ("int8", "fp16")
DIGITS = 4  # of an average precision in the card
BATCH = 4  # images in memory at a time, with all activations
TIMED_IMAGES = 8  # the time of NMS depends on the image
ROUNDS = 15
SECONDS = 4.0  # of timing per file, about


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
    """Detect with scores from `SCORE_FLOOR` on, with the file's own NMS threshold."""
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
    """Measure files of one detector on images with boxes that it was not trained on.

    Args:
        files: The files by the precision of their cores; they take float32 images.
        config: The detector's configuration.
        dataset: The images.

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

    Images are float32 `[3, H, W]`, and used in turn.
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


@dataclass(frozen=True)
class Splits:
    """The images that quantization needs.

    Attributes:
        calibration: Images to observe the ranges of activations on (int8), preferably those the
            detector was trained on.
        held_out: Images whose scores thresholds are derived from.
        test: Images to measure both precisions on.
    """

    calibration: DetectionDataset
    held_out: DetectionDataset
    test: DetectionDataset


def open_splits(
    checkpoint: Checkpoint,
    data: str | None = None,
    *,
    calibration: str | None = None,
    test: str = "test",
) -> Splits:
    """Open the splits of a checkpoint's data set, or of another with the same classes.

    Args:
        checkpoint: The detector's checkpoint.
        data: A data set as `open_dataset` takes it; the training data if None.
        calibration: The split to calibrate on; the training split if None.
        test: The split to measure on.
    """
    training, names = checkpoint.training, checkpoint.config.class_names

    def split(name: str) -> DetectionDataset:
        return open_dataset(data or training["data"], name, class_names=names)

    return Splits(
        split(calibration or training["train_split"]), split(training["val_split"]), split(test)
    )


@dataclass(frozen=True)
class Tradeoff:
    """Gains and losses of a smaller file.

    Attributes:
        before: The file in float32.
        after: The smaller one.
        card: The card of the smaller one.
    """

    before: Measured
    after: Measured
    card: DetectorCard

    @property
    def drop(self) -> float:
        """Points (hundredths) of COCO AP that are lost; negative if there is a gain."""
        return 100 * (self.before.quality.ap - self.after.quality.ap)

    @property
    def speedup(self) -> float:
        """Latency before divided by latency after."""
        return self.before.milliseconds / self.after.milliseconds

    def table(self) -> str:
        """Format both files and the change between them for a terminal."""
        made, (old, new) = self.card.quantization, (self.before, self.after)
        if made is None:
            raise ValueError(f"{self.card.name} is not quantised")
        title = f"{made.test_images} images of {made.test_data}, split {made.test_split}"
        if made.calibration_data:
            title += (
                f"; calibrated on {made.calibration_images} of"
                f" {made.calibration_data}, split {made.calibration_split}"
            )
        rows = [
            (
                each.precision,
                f"{each.quality.ap:.3f}",
                f"{each.quality.ap50:.3f}",
                f"{each.size / 1e6:.2f} MB",
                f"{each.milliseconds:.2f} ms",
            )
            for each in (old, new)
        ]
        change = (
            "change",
            f"{-self.drop:+.2f}",
            f"{100 * (new.quality.ap50 - old.quality.ap50):+.2f}",
            f"{new.size / old.size:.2f}x",
            f"{self.speedup:.2f}x as fast",
        )
        # The mean may hide the class that loses most.
        classes = {
            name: (ap, new.quality.per_class[name][0])
            for name, (ap, _) in old.quality.per_class.items()
            if ap == ap
        }
        worst = max(classes, key=lambda name: classes[name][0] - classes[name][1])
        ap_before, ap_after = classes[worst]
        shown = table(("", "AP", "AP50", "size", "latency"), [*rows, change])
        return (
            f"{printable(title)}\n{shown}\n"
            f"class that loses most: {printable(worst)}, AP {ap_before:.3f} to {ap_after:.3f}\n"
            "latency: one image, one thread, median of calls in turns; change of AP in points"
        )


class AccuracyLossError(ValueError):
    """The smaller detector loses more than is allowed, see `tradeoff`, and was not written."""

    def __init__(self, tradeoff: Tradeoff, allowed: float) -> None:
        before, after = tradeoff.before, tradeoff.after
        super().__init__(
            f"{after.precision} loses {tradeoff.drop:.2f} points of AP"
            f" ({before.quality.ap:.4f} to {after.quality.ap:.4f}), more than the {allowed:g}"
            " allowed; nothing was written. --float-last and more --calibrate-images may help;"
            " --max-drop allows more, --force all"
        )
        self.tradeoff = tradeoff


def export_quantized(
    checkpoint_path: str | Path,
    output_path: str | Path,
    precision: str,
    splits: Splits,
    *,
    images: int = 64,
    recipe: Int8Recipe | None = None,
    max_drop: float = 1.0,
    force: bool = False,
    input_type: str = "float32",
    **card_options: Any,
) -> Tradeoff:
    """Write a checkpoint's detector with a quantized core, if it is still good enough.

    The thresholds are derived again, by the same policy, from the scores of the smaller detector
    on the held-out split. The same arguments give the same bytes on the same kind of processor.

    Args:
        checkpoint_path: A checkpoint that training wrote.
        output_path: Where to write; replaced only once the new file is complete.
        precision: `int8`, for CPUs, or `fp16`, for GPUs (a CPU computes in float32, more slowly).
        splits: Images to calibrate, derive thresholds and measure on.
        images: Number of images to calibrate on, evenly spread over their split (int8).
        recipe: Options of int8; the defaults if None.
        max_drop: Points (hundredths) of COCO AP that may be lost.
        force: Write the file whatever it loses.
        input_type: `float32`, `uint8` or `both`; measurements are taken with float32 images.
        **card_options: `policy`, `iou_threshold` and `name`, as for `export_detector`.

    Returns:
        The measurements, and the card of the new file.

    Raises:
        AccuracyLossError: It would lose more than `max_drop`; nothing was written.
        ValueError: An option is unknown or out of range, or a split has no boxes; and as
            `export_detector`.
    """
    checkpoint_path, output_path = Path(checkpoint_path), Path(output_path)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    if not max_drop >= 0:  # NaN fails too
        raise ValueError(f"max_drop must be at least 0 points, got {max_drop}")
    check_outputs(output_path, input_type, checkpoint_path)
    checkpoint, digest = Checkpoint.load(checkpoint_path), sha256_of(checkpoint_path)
    config, chosen = checkpoint.config, spread(len(splits.calibration), images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)  # issued for the thresholds that are kept
        card = make_card(checkpoint, digest, **card_options)
    model = build_graph(checkpoint.detector(), card.class_thresholds, card.iou_threshold)
    if precision == "int8":
        calibration = (prepared(splits.calibration, config, [i])[0] for i in chosen)
        smaller = to_int8(model, calibration, recipe or Int8Recipe())
    else:
        smaller = to_float16(model)
    statistics = copy.deepcopy(checkpoint.statistics)
    observe(statistics, detect_all(detector_bytes(smaller, card), config, splits.held_out))
    rescored = replace(checkpoint, statistics=statistics)
    smaller_card = make_card(rescored, digest, **card_options)
    set_default(smaller, THRESHOLDS_INPUT, smaller_card.class_thresholds)
    contents = {
        "float32": detector_bytes(model, card),
        precision: detector_bytes(smaller, smaller_card),
    }
    before, after = measure(contents, config, splits.test)
    calibrated = (splits.calibration.name, splits.calibration.split, len(chosen))
    data, split, count = calibrated if precision == "int8" else (None, None, 0)
    quantization = QuantizationCard(
        precision=cast(Precision, precision),
        calibration_data=data,
        calibration_split=split,
        calibration_images=count,
        test_data=splits.test.name,
        test_split=splits.test.split,
        test_images=len(splits.test),
        ap_before=round(before.quality.ap, DIGITS),
        ap_after=round(after.quality.ap, DIGITS),
    )
    changes = {"quantization": quantization, "format_version": FORMAT_VERSION}
    smaller_card = DetectorCard.model_validate({**dict(smaller_card), **changes})
    after = replace(after, size=len(detector_bytes(smaller, smaller_card)))
    tradeoff = Tradeoff(before, after, smaller_card)
    if tradeoff.drop > max_drop and not force:
        raise AccuracyLossError(tradeoff, max_drop)
    written = write_variants(output_path, input_type, smaller, smaller_card)
    return replace(tradeoff, card=written)
