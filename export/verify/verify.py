"""Whether a file detects what its checkpoint detects, on images."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.card import DetectorCard
from export.detector import make_card
from export.file import read_detector
from export.runtimes import find_runtimes
from export.thresholds import set_thresholds
from export.verify.compare import Comparison, Tolerance
from export.verify.side_by_side import CHECKPOINT, SideBySide
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import MeanAveragePrecision, mean_average_precision
from ghm_triton.detection.training.checkpoint import Checkpoint, sha256_of
from ghm_triton.evidence import ThresholdWarning
from ghm_triton.tables import printable, table

SLOW_IMAGES = 2  # a number that a slow runtime runs in seconds
GROUP = 24  # images in memory at a time; whole batches of 1, 3 and 8
# Rounding may decide this share of the detections, or one; more indicates a fault.
BORDERLINE_SHARE = 0.01
SHOWN = 10  # mismatches listed per run


class Samples(Protocol):
    """Images by index: a `DetectionDataset`, or a list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass
class VerifyReport:
    """A comparison of a file with its checkpoint.

    Attributes:
        images: Number of images compared.
        class_names: The classes in label order.
        runs: The comparison of each runtime, setting and batch size.
        problems: A description of each difference; empty if there is none.
        titles: Name and version of each runtime.
        missing: Runtimes that are not installed, with the command that installs them.
        average_precision: Of the checkpoint, and of the file in each runtime that runs all images,
            on those images; empty if they have no ground truth.
    """

    images: int
    class_names: tuple[str, ...]
    runs: dict[tuple[str, str, int], Comparison] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    average_precision: dict[str, MeanAveragePrecision] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the file detects the same as the checkpoint."""
        return not self.problems

    def total(self, runtime: str | None = None) -> Comparison:
        """The sum of all runs, or of those of one runtime."""
        total = Comparison(np.zeros(len(self.class_names), dtype=np.int64))
        for key, run in self.runs.items():
            if runtime in (None, key[0]):
                total.add(run)
        return total

    def conclude(self) -> None:
        """Add what the runs show to `problems`."""
        for (runtime, name, batch), run in self.runs.items():
            where = f"{runtime}, {name}, batch {batch}"
            self.problems += [f"{where}: {text}" for text in run.mismatches[:SHOWN]]
            if len(run.mismatches) > SHOWN:
                self.problems.append(f"{where}: {len(run.mismatches) - SHOWN} more like these")
        for runtime in self._runtimes():
            total = self.total(runtime)
            matched = int(total.matched.sum())
            allowed = max(1, int(BORDERLINE_SHARE * matched))
            if total.borderline > allowed:
                self.problems.append(
                    f"{runtime}: {total.borderline} detections are borderline, on one side alone;"
                    f" rounding explains at most {allowed} among {matched}"
                )
            if not matched and not total.mismatches:
                self.problems.append(
                    f"{runtime}: neither side detects anything in these images; nothing was"
                    " compared"
                )

    def table(self) -> str:
        """Format the report for a terminal."""
        lines = [f"{self.images} images, the file on a CPU against the checkpoint in torch"]
        lines += [f"{name} is not installed: {how}" for name, how in self.missing.items()]
        head = ("setting", "batch", "detections", "borderline", "max |score|", "max |box| px")
        for runtime in self._runtimes():
            rows = [
                (*key, run.matched.sum(), run.borderline, f"{run.score:.1e}", f"{run.box:.1e}")
                for (ran, *key), run in self.runs.items()
                if ran == runtime
            ]
            by_class = zip(self.class_names, self.total(runtime).matched.tolist(), strict=True)
            counts = ", ".join(f"{name} {count}" for name, count in by_class)
            title = self.titles.get(runtime, runtime)
            lines += ["", title, table(head, rows), printable(f"compared by class: {counts}")]
        if self.average_precision:
            results = self.average_precision.items()
            maps = [(side, f"{each.ap:.4f}", f"{each.ap50:.4f}") for side, each in results]
            lines += ["", table(("mAP", "AP", "AP50"), maps)]
        lines += [printable(f"PROBLEM {problem}") for problem in self.problems]
        lines.append("the file does what the checkpoint does" if self.ok else "FAILED")
        return "\n".join(lines)

    def _runtimes(self) -> list[str]:
        return list(dict.fromkeys(runtime for runtime, _, _ in self.runs))


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
        runtimes: Names of runtimes, of `export.runtimes.RUNTIME_NAMES`; or `all` for those
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
    report = VerifyReport(count, checkpoint.config.class_names, missing=missing)
    few = f", slow: {slow_images} of the images" if slow_images < count else ""
    report.titles = {each.name: each.title() + few * each.slow for each in installed}
    report.problems += card_problems(file.card, checkpoint, sha256_of(checkpoint_path))
    config, frame = checkpoint.config, file.card.preprocessing
    sizes = (frame.height, frame.width), config.image_size
    if tuple(file.card.class_names) != config.class_names or sizes[0] != sizes[1]:
        return report
    pair = SideBySide(file, checkpoint, installed, tolerance, slow_images)
    chosen = [i * len(samples) // count for i in range(count)]
    group = max(GROUP, *batch_sizes)
    for start in range(0, count if pair.runtimes else 0, group):
        pair.compare([samples[i] for i in chosen[start:][:group]], batch_sizes)
    report.runs = pair.runs
    report.problems += pair.problems
    report.conclude()
    if any(len(sample.boxes) for sample, _ in pair.detected[CHECKPOINT]):
        report.average_precision = {
            side: mean_average_precision(report.class_names, results)
            for side, results in pair.detected.items()
        }
    return report


def card_problems(card: DetectorCard, checkpoint: Checkpoint, sha256: str) -> list[str]:
    """Describe each difference of a card from that of a checkpoint, whose file has a digest."""
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
