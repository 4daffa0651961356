"""Whether a file detects what its checkpoint detects, on images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from export.card import DetectorCard
from export.detector import make_card
from export.file import read_detector
from export.thresholds import set_thresholds
from export.verify.compare import Tolerance
from export.verify.report import VerifyReport
from export.verify.runtimes import Runtime, find_runtimes
from export.verify.side_by_side import CHECKPOINT, SideBySide
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import mean_average_precision
from ghm_triton.detection.training.checkpoint import Checkpoint, sha256_of
from ghm_triton.evidence import ThresholdWarning

SLOW_IMAGES = 2  # a number that a slow runtime runs in seconds
GROUP = 24  # images in memory at a time; whole batches of 1, 3 and 8


class Samples(Protocol):
    """Images by index: a `DetectionDataset`, or a list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def verify(
    onnx_path: str | Path,
    checkpoint_path: str | Path,
    samples: Samples,
    *,
    images: int | None = None,
    batch_sizes: Sequence[int] = (1, 3, 8),
    tolerance: Tolerance | None = None,
    runtimes: Sequence[str] = ("onnxruntime",),
    slow_images: int = SLOW_IMAGES,
) -> VerifyReport:
    """Compare a file with the checkpoint that its card names, on images.

    The card must be the one that the checkpoint yields. Then both detect objects in every image,
    with the file's own thresholds, with thresholds at which every class has detections, and with
    another IoU threshold in addition. Detections are matched one to one in any order. The mAP of
    both is measured on the same images, but not judged.

    Args:
        onnx_path: The file, of either input type, run on the CPU.
        checkpoint_path: The checkpoint, run by torch on the CPU.
        samples: Images, such as a data set's held-out split.
        images: Number of images to compare, spread evenly; all if None.
        batch_sizes: Images per call of the file, 1 to 64; too few are repeated to fill a batch.
        tolerance: How far matched detections may differ; 0.1 px and 1e-4 if None.
        runtimes: Names of runtimes, of `export.verify.runtimes.RUNTIME_NAMES`; or `all` for those
            installed.
        slow_images: Number of images that slow runtimes (`reference`) run, the first ones.

    Returns:
        A report; `report.ok` is whether the file detects the same.

    Raises:
        CardError: The file breaks its contract, for example with thresholds that differ from its
            card's.
        CheckpointError: The checkpoint is missing or damaged.
        MissingRuntimeError: A runtime requested by name is not installed.
        ValueError: There are no images, for slow runtimes or for all, a batch size is not between
            1 and 64, or a runtime is unknown.
    """
    count = len(samples) if images is None else min(images, len(samples))
    if count < 1:
        raise ValueError(f"no images to compare on ({len(samples)} given, {images} asked for)")
    if slow_images < 1:
        raise ValueError(f"slow runtimes need an image or more, got {slow_images}")
    if not batch_sizes or any(not 1 <= size <= 64 for size in batch_sizes):
        raise ValueError(f"batch sizes must lie in 1..64, got {tuple(batch_sizes)}")
    installed, missing = find_runtimes(runtimes)
    file, checkpoint_path = read_detector(onnx_path), Path(checkpoint_path)
    checkpoint = Checkpoint.load(checkpoint_path)
    report = VerifyReport(count, checkpoint.config.class_names)
    report.titles = {runtime.name: _title(runtime, count, slow_images) for runtime in installed}
    report.missing = {runtime.name: runtime.how_to_install() for runtime in missing}
    report.problems += card_problems(file.card, checkpoint, sha256_of(checkpoint_path))
    config, frame = checkpoint.config, file.card.preprocessing
    sizes = (frame.height, frame.width), config.image_size
    if tuple(file.card.class_names) != config.class_names or sizes[0] != sizes[1]:
        return report
    pair = SideBySide(report, file, checkpoint, installed, tolerance, slow_images)
    chosen = [i * len(samples) // count for i in range(count)]
    group = max(GROUP, *batch_sizes)
    for start in range(0, count if pair.runtimes else 0, group):
        pair.compare([samples[i] for i in chosen[start:][:group]], batch_sizes)
    report.conclude()
    if any(len(sample.boxes) for sample, _ in pair.detected[CHECKPOINT]):
        report.average_precision = {
            side: mean_average_precision(report.class_names, results)
            for side, results in pair.detected.items()
        }
    return report


def _title(runtime: type[Runtime], count: int, slow_images: int) -> str:
    few = runtime.slow and slow_images < count
    return runtime.title() + (f", slow: {slow_images} of the images" if few else "")


def card_problems(card: DetectorCard, checkpoint: Checkpoint, sha256: str) -> list[str]:
    """Compare a card with the one that a checkpoint yields.

    Args:
        card: The card.
        checkpoint: The checkpoint.
        sha256: The digest of its file.

    Returns:
        A description of each difference.
    """
    problems = []
    named = card.training.checkpoint_sha256
    if named != sha256:
        problems.append(
            "the file was exported from another checkpoint:"
            f" its card names sha256 {named}, this one is {sha256}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ThresholdWarning)  # issued at export
            expected = make_card(
                checkpoint,
                named,
                policy=card.threshold_policy,
                iou_threshold=card.iou_threshold,
                name=card.name,
            )
        by_hand = {e.name: e.threshold for e in card.thresholds if e.source == "manual"}
        if by_hand:  # the evidence at such a threshold must be the checkpoint's all the same
            expected = set_thresholds(expected, by_hand)
    except ValueError as error:
        return [*problems, f"the checkpoint does not give such a card: {error}"]
    same = {"input": card.input, "format_version": card.format_version}
    ours, theirs = (json.loads(c.to_json()) for c in (expected.model_copy(update=same), card))
    return problems + [
        f"the card's {key} is {_shorten(theirs[key])}, the checkpoint's {_shorten(ours[key])}"
        for key in ours
        if ours[key] != theirs[key]
    ]


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
