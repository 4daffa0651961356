"""Does the file detect what the checkpoint detects? Asked on images, answered with a report."""

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
from export.thresholds import set_thresholds
from export.verify.compare import Comparison, Tolerance
from export.verify.runtimes import Runtime, find_runtimes, how_to_install
from export.verify.side_by_side import CHECKPOINT, Findings, Found, SideBySide
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import MeanAveragePrecision, mean_average_precision
from ghm_triton.detection.training.checkpoint import Checkpoint, sha256_of
from ghm_triton.evidence import ThresholdWarning

# Rounding may decide this share of the detections, or one; more is a fault that looks like it.
BORDERLINE_SHARE = 0.01
SLOW_IMAGES = 2  # as many as a slow runtime gets through in seconds
SHOWN = 10  # mismatches spelled out in a report
GROUP = 24  # images in memory at a time; whole batches of 1, 3 and 8


class Samples(Protocol):
    """Images by index: a `DetectionDataset`, or a list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass
class VerifyReport:
    """What was compared, and what was wrong.

    Attributes:
        images: Images compared.
        class_names: The classes in label order.
        runs: The comparison of each runtime, setting and batch size.
        problems: Whatever makes the file differ from the checkpoint, in words; empty if it does
            not.
        titles: Each runtime that was asked, with its version.
        missing: Runtimes that are not installed, with the command that brings them.
        average_precision: Of the checkpoint and of the file in each runtime that is fast enough
            for all images, on those images; empty where they have no boxes to find.
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
        """Whether the file stands for the checkpoint."""
        return not self.problems

    def nothing(self) -> Comparison:
        """A comparison to add to."""
        return Comparison(np.zeros(len(self.class_names), dtype=np.int64))

    def total(self, runtime: str | None = None) -> Comparison:
        """All runs together, or those of one runtime."""
        total = self.nothing()
        for (ran, _, _), run in self.runs.items():
            if runtime in (None, ran):
                total.add(run)
        return total

    def conclude(self) -> None:
        """Judge the runs: add to `problems` whatever they showed."""
        for (runtime, name, batch), run in self.runs.items():
            place = f"{runtime}, {name}, batch {batch}"
            self.problems += [f"{place}: {text}" for text in run.mismatches[:SHOWN]]
            if len(run.mismatches) > SHOWN:
                self.problems.append(f"{place}: {len(run.mismatches) - SHOWN} more like these")
        for runtime in dict.fromkeys(ran for ran, _, _ in self.runs):
            self._judge(runtime)

    def _judge(self, runtime: str) -> None:
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
                f"{runtime}: neither side detects anything in these images; nothing was compared"
            )

    def table(self) -> str:
        """The report for a terminal."""
        lines = [f"{self.images} images, the file on a CPU against the checkpoint in torch"]
        lines += [f"{name} is not installed: {how}" for name, how in self.missing.items()]
        for runtime in dict.fromkeys(ran for ran, _, _ in self.runs):
            lines += self._run_lines(runtime)
        lines += self._precision_lines()
        lines += [f"PROBLEM {problem}" for problem in self.problems]
        return "\n".join(
            [*lines, "the file does what the checkpoint does" if self.ok else "FAILED"]
        )

    def _run_lines(self, runtime: str) -> list[str]:
        runs = {key[1:]: run for key, run in self.runs.items() if key[0] == runtime}
        width = max(len(name) for name, _ in runs)
        head = f"{'setting':<{width}}  batch  detections  borderline  max |score|  max |box| px"
        rows = [
            f"{name:<{width}}  {batch:5d}  {run.matched.sum():10d}  {run.borderline:10d}"
            f"  {run.score:11.1e}  {run.box:12.1e}"
            for (name, batch), run in runs.items()
        ]
        by_class = zip(self.class_names, self.total(runtime).matched.tolist(), strict=True)
        classes = ", ".join(f"{name} {count}" for name, count in by_class)
        title = self.titles.get(runtime, runtime)
        return ["", title, head, "-" * len(head), *rows, f"compared by class: {classes}"]

    def _precision_lines(self) -> list[str]:
        if not self.average_precision:
            return []
        width = max(len(side) for side in self.average_precision)
        head = f"{'mAP':<{width}}  {'AP':>7}  {'AP50':>7}"
        rows = [
            f"{side:<{width}}  {found.ap:7.4f}  {found.ap50:7.4f}"
            for side, found in self.average_precision.items()
        ]
        return ["", head, "-" * len(head), *rows]


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
    """Compare a file with the checkpoint it claims to come from, on images.

    The card must be what the checkpoint gives. Then both detect in every image: with the file's
    own thresholds; with thresholds put where every class is seen; and with another IoU threshold
    on top. Detections are matched one to one whatever their order. The mAP of both is measured on
    the same images, and left to the reader to judge.

    Args:
        onnx_path: The file, of either input type, run on the CPU.
        checkpoint_path: The checkpoint, run by torch on the CPU.
        samples: Images, such as a data set's held-out split.
        images: How many of them, spread evenly; all where None.
        batch_sizes: Images a call of the file; too few images are repeated to fill a batch.
        tolerance: How far matched detections may differ; 0.1 px and 1e-4 where None.
        runtimes: What runs the file, of `export.verify.runtimes.RUNTIME_NAMES`; or `all`: whatever
            is installed.
        slow_images: How many of the images the slow one gets, `reference`: the first of them.

    Returns:
        A report; `report.ok` says whether the file stands for the checkpoint.

    Raises:
        CardError: The file breaks its contract, as when its thresholds are not its card's.
        CheckpointError: The checkpoint is missing or damaged.
        MissingRuntimeError: A runtime that was asked for by name is not installed.
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
    there, missing = find_runtimes(runtimes)
    file, checkpoint_path = read_detector(onnx_path), Path(checkpoint_path)
    checkpoint = Checkpoint.load(checkpoint_path)
    report = VerifyReport(count, checkpoint.config.class_names)
    report.titles = {runtime.name: _title(runtime, count, slow_images) for runtime in there}
    report.missing = {runtime.name: how_to_install(runtime) for runtime in missing}
    report.problems += card_problems(file.card, checkpoint, sha256_of(checkpoint_path))
    if not _comparable(file.card, checkpoint):
        return report
    chosen = [i * len(samples) // count for i in range(count)]
    size = max(GROUP, *batch_sizes)
    pair = SideBySide(file, checkpoint, tolerance or Tolerance(), there, slow_images)
    report.problems += pair.refusals
    found: dict[str, Found] = {}
    for start in range(0, count if pair.runtimes else 0, size):
        _take_in(
            report, found, pair.compare([samples[i] for i in chosen[start:][:size]], batch_sizes)
        )
    report.conclude()
    if any(len(sample.boxes) for sample, _ in found.get(CHECKPOINT, [])):
        report.average_precision = {
            side: mean_average_precision(report.class_names, results)
            for side, results in found.items()
            if len(results) == count
        }
    return report


def _title(runtime: type[Runtime], count: int, slow_images: int) -> str:
    few = runtime.slow and slow_images < count
    return runtime.title() + (f", slow: {slow_images} of the images" if few else "")


def _take_in(report: VerifyReport, found: dict[str, Found], findings: Findings) -> None:
    for key, run in findings.runs.items():
        report.runs.setdefault(key, report.nothing()).add(run)
    for side, results in findings.found.items():
        found.setdefault(side, []).extend(results)
    for name, fault in findings.faults.items():
        report.problems.append(fault)
        report.runs = {key: run for key, run in report.runs.items() if key[0] != name}


def card_problems(card: DetectorCard, checkpoint: Checkpoint, sha256: str) -> list[str]:
    """Where a card is not what its checkpoint gives, in words."""
    problems = []
    named = card.training.checkpoint_sha256
    if named != sha256:
        problems.append(
            "the file was exported from another checkpoint:"
            f" its card names sha256 {named}, this one is {sha256}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ThresholdWarning)  # told at export
            expected = make_card(
                checkpoint,
                named,
                policy=card.threshold_policy,
                iou_threshold=card.iou_threshold,
                name=card.name,
            ).model_copy(update={"input": card.input})
        by_hand = {e.name: e.threshold for e in card.thresholds if e.source == "manual"}
        if by_hand:  # the evidence at such a threshold must be the checkpoint's all the same
            expected = set_thresholds(expected, by_hand)
        expected = expected.model_copy(update={"format_version": card.format_version})
    except ValueError as error:
        return [*problems, f"the checkpoint does not give such a card: {error}"]
    ours, theirs = json.loads(expected.to_json()), json.loads(card.to_json())
    return problems + [
        f"the card's {key} is {_shorten(theirs[key])}, the checkpoint's {_shorten(ours[key])}"
        for key in ours
        if ours[key] != theirs[key]
    ]


def _comparable(card: DetectorCard, checkpoint: Checkpoint) -> bool:
    config, frame = checkpoint.config, card.preprocessing
    return (
        tuple(card.class_names) == config.class_names
        and (frame.height, frame.width) == config.image_size
    )


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
