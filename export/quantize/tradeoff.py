"""A smaller and faster file, written only if it is worth it: measured before and after."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from onnx import ModelProto

from export.card import (
    FORMAT_VERSION,
    THRESHOLDS_INPUT,
    DetectorCard,
    Precision,
    QuantizationCard,
)
from export.detector import check_outputs, make_card, write_variants
from export.file import detector_bytes, set_default
from export.graph import build_graph
from export.quantize.calibrate import Image
from export.quantize.convert import Int8Recipe, to_float16, to_int8
from export.quantize.measure import Measured, detect_all, measure, prepared, spread
from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.evaluate import observe
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.checkpoint import Checkpoint, sha256_of
from ghm_triton.evidence import ClassStatistics, ThresholdWarning

PRECISIONS = ("int8", "fp16")
DIGITS = 4  # of an average precision in the card


@dataclass(frozen=True)
class Splits:
    """The images that quantisation needs.

    Attributes:
        calibration: Shows the ranges of activations (int8); best what the detector learnt from.
        held_out: Thresholds are derived from its scores.
        test: Both precisions are measured on it.
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
    """Open the splits of a checkpoint's data set, or of another with its classes.

    Args:
        checkpoint: Of the detector.
        data: As `open_dataset` takes it; what the checkpoint was trained on where None.
        calibration: The split to calibrate on; the one it learnt from where None.
        test: The split to measure on.

    Raises:
        ValueError: The data set or a split is not known, or has other classes.
        OSError: It cannot be read.
    """
    training, names = checkpoint.training, checkpoint.config.class_names

    def split(name: str) -> DetectionDataset:
        return open_dataset(data or training["data"], name, class_names=names)

    return Splits(
        split(calibration or training["train_split"]), split(training["val_split"]), split(test)
    )


@dataclass(frozen=True)
class Tradeoff:
    """What a smaller file gains, and what it loses.

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
        """Points (hundredths) of COCO AP that are lost; negative where some are gained."""
        return 100 * (self.before.quality.ap - self.after.quality.ap)

    @property
    def speedup(self) -> float:
        """How many times faster the smaller file is."""
        return self.before.milliseconds / self.after.milliseconds

    def table(self) -> str:
        """Both files and the change between them, for a terminal."""
        made = self.card.quantization
        if made is None:
            raise ValueError(f"{self.card.name} is not quantised")
        where = f"{made.test_images} images of {made.test_data}, split {made.test_split}"
        if made.calibration_data:
            where += (
                f"; calibrated on {made.calibration_images} of"
                f" {made.calibration_data}, split {made.calibration_split}"
            )
        head = f"{'':8}  {'AP':>6}  {'AP50':>6}  {'size':>9}  {'latency':>10}"
        rows = [
            f"{each.precision:8}  {each.quality.ap:6.3f}  {each.quality.ap50:6.3f}"
            f"  {each.size / 1e6:6.2f} MB  {each.milliseconds:7.2f} ms"
            for each in (self.before, self.after)
        ]
        gain = 100 * (self.after.quality.ap50 - self.before.quality.ap50)
        share = self.after.size / self.before.size
        change = (
            f"{'change':8}  {-self.drop:+6.2f}  {gain:+6.2f}  {share:8.2f}x  {self.speedup:7.2f}x"
            " as fast"
        )
        note = "latency: one image, one thread, median of calls in turns; change of AP in points"
        return "\n".join([where, head, "-" * len(head), *rows, change, self._worst(), note])

    def _worst(self) -> str:
        """The class that loses most; the mean may hide it."""
        pairs = zip(self.before.quality.rows(), self.after.quality.rows(), strict=True)
        losses = [(old[0] - new[0], name, old[0], new[0]) for (name, old), (_, new) in pairs]
        _, name, old_ap, new_ap = max(loss for loss in losses[:-1] if loss[0] == loss[0])
        return f"class that loses most: {name}, AP {old_ap:.3f} to {new_ap:.3f}"


class AccuracyLossError(ValueError):
    """The smaller detector loses more than is allowed; nothing was written.

    Attributes:
        tradeoff: What was measured.
    """

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
    precision: Precision,
    splits: Splits,
    *,
    images: int = 64,
    recipe: Int8Recipe | None = None,
    max_drop: float = 1.0,
    force: bool = False,
    policy: str = "f1",
    iou_threshold: float | None = None,
    name: str | None = None,
    input_type: Literal["float32", "uint8", "both"] = "float32",
) -> Tradeoff:
    """Write a checkpoint's detector with a core of smaller numbers, if it is still good enough.

    The thresholds are derived anew, by the same policy, from the scores of the smaller detector on
    the held-out split: they fit the file that carries them. The same checkpoint, images and
    arguments give the same bytes on the same kind of processor.

    Args:
        checkpoint_path: A checkpoint that training wrote.
        output_path: As for `export_detector`.
        precision: `int8`, for CPUs, or `fp16`, for GPUs (a CPU computes it as float32, slower).
        splits: What to calibrate, derive thresholds and measure on.
        images: How many images to calibrate on, evenly spread over their split (int8).
        recipe: How numbers become integers; the default where None.
        max_drop: Points (hundredths) of COCO AP that may be lost.
        force: Write the file whatever it loses.
        policy: As for `export_detector`.
        iou_threshold: As for `export_detector`.
        name: As for `export_detector`.
        input_type: As for `export_detector`; what is measured takes float32 images.

    Returns:
        What was measured, and the card of the new file.

    Raises:
        AccuracyLossError: It would lose more than `max_drop`; nothing was written.
        CheckpointError: As for `export_detector`.
        ValueError: As for `export_detector`, a number is out of range, or a split has no boxes.
        OSError: A file cannot be read or written.
    """
    checkpoint_path, output_path = Path(checkpoint_path), Path(output_path)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    if not max_drop >= 0:  # written so that NaN is refused
        raise ValueError(f"max_drop must be at least 0 points, got {max_drop}")
    check_outputs(output_path, input_type, checkpoint_path)
    checkpoint, digest = Checkpoint.load(checkpoint_path), sha256_of(checkpoint_path)

    def card_of(saved: Checkpoint) -> DetectorCard:
        return make_card(saved, digest, policy=policy, iou_threshold=iou_threshold, name=name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)  # told of the thresholds that are kept
        card = card_of(checkpoint)
    model = build_graph(checkpoint.detector(), card.class_thresholds, card.iou_threshold)
    config, seen = checkpoint.config, spread(len(splits.calibration), images)
    if precision == "int8":
        calibration = _prepared_one_by_one(splits.calibration, config, seen)
        smaller = to_int8(model, calibration, recipe or Int8Recipe())
    else:
        smaller = to_float16(model)
    scored = _scored_anew(checkpoint, detector_bytes(smaller, card), splits.held_out)
    card_after = card_of(scored)
    set_default(smaller, THRESHOLDS_INPUT, card_after.class_thresholds)
    tradeoff = _weigh(
        (model, card), (smaller, card_after), precision, config, splits, images=len(seen)
    )
    if tradeoff.drop > max_drop and not force:
        raise AccuracyLossError(tradeoff, max_drop)
    written = write_variants(output_path, input_type, smaller, tradeoff.card)
    return replace(tradeoff, card=written)


def _prepared_one_by_one(
    dataset: DetectionDataset, config: DetectorConfig, indices: list[int]
) -> Iterator[Image]:
    return (prepared(dataset, config, [i])[0] for i in indices)


def _scored_anew(checkpoint: Checkpoint, content: bytes, held_out: DetectionDataset) -> Checkpoint:
    """The checkpoint with held-out scores of another detector than its own."""
    statistics: ClassStatistics = copy.deepcopy(checkpoint.statistics)
    observe(statistics, detect_all(content, checkpoint.config, held_out))
    return replace(checkpoint, statistics=statistics)


Detector = tuple[ModelProto, DetectorCard]


def _weigh(
    before: Detector,
    after: Detector,
    precision: Precision,
    config: DetectorConfig,
    splits: Splits,
    *,
    images: int,
) -> Tradeoff:
    """Measure both, and note in the second's card how it was made and what it costs."""
    contents = {"float32": detector_bytes(*before), precision: detector_bytes(*after)}
    old, new = measure(contents, config, splits.test)
    calibrated = precision == "int8"
    made = QuantizationCard(
        precision=precision,
        calibration_data=splits.calibration.name if calibrated else None,
        calibration_split=splits.calibration.split if calibrated else None,
        calibration_images=images if calibrated else 0,
        test_data=splits.test.name,
        test_split=splits.test.split,
        test_images=len(splits.test),
        ap_before=round(old.quality.ap, DIGITS),
        ap_after=round(new.quality.ap, DIGITS),
    )
    model, card = after
    changes = {"quantization": made, "format_version": FORMAT_VERSION}
    card = DetectorCard.model_validate({**dict(card), **changes})
    return Tradeoff(old, replace(new, size=len(detector_bytes(model, card))), card)
