"""Does the file detect what the checkpoint detects? Asked on images, answered with a report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from export.compare import Comparison, Tolerance
from export.contract import DetectorCard
from export.detector import make_card
from export.file import read_detector
from export.side_by_side import SideBySide, UnrunnableError
from ghm_triton.detection.checkpoint import Checkpoint, sha256_of
from ghm_triton.detection.data import Sample
from ghm_triton.thresholds import ThresholdWarning

# Rounding may decide this share of the detections, or one; more is a fault that looks like it.
BORDERLINE_SHARE = 0.01
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
        runs: The comparison of each setting and batch size.
        problems: Whatever makes the file differ from the checkpoint, in words; empty if it does
            not.
    """

    images: int
    class_names: tuple[str, ...]
    runs: dict[tuple[str, int], Comparison] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the file stands for the checkpoint."""
        return not self.problems

    def nothing(self) -> Comparison:
        """A comparison to add to."""
        return Comparison(np.zeros(len(self.class_names), dtype=np.int64))

    def total(self) -> Comparison:
        """All runs together."""
        total = self.nothing()
        for run in self.runs.values():
            total.add(run)
        return total

    def conclude(self) -> None:
        """Judge the runs: add to `problems` whatever they showed."""
        for (name, batch), run in self.runs.items():
            place = f"{name}, batch {batch}"
            self.problems += [f"{place}: {text}" for text in run.mismatches[:SHOWN]]
            if len(run.mismatches) > SHOWN:
                self.problems.append(f"{place}: {len(run.mismatches) - SHOWN} more like these")
        total = self.total()
        matched = int(total.matched.sum())
        allowed = max(1, int(BORDERLINE_SHARE * matched))
        if total.borderline > allowed:
            self.problems.append(
                f"{total.borderline} detections are borderline, on one side alone;"
                f" rounding explains at most {allowed} among {matched}"
            )
        if not matched and not total.mismatches:
            self.problems.append(
                "neither side detects anything in these images; nothing was compared"
            )

    def table(self) -> str:
        """The report for a terminal."""
        lines = [f"{self.images} images, onnxruntime on CPU against the checkpoint in torch"]
        if self.runs:
            lines += self._run_lines()
        lines += [f"PROBLEM {problem}" for problem in self.problems]
        return "\n".join(
            [*lines, "the file does what the checkpoint does" if self.ok else "FAILED"]
        )

    def _run_lines(self) -> list[str]:
        width = max(len(name) for name, _ in self.runs)
        head = f"{'setting':<{width}}  batch  detections  borderline  max |score|  max |box| px"
        rows = [
            f"{name:<{width}}  {batch:5d}  {run.matched.sum():10d}  {run.borderline:10d}"
            f"  {run.score:11.1e}  {run.box:12.1e}"
            for (name, batch), run in self.runs.items()
        ]
        by_class = zip(self.class_names, self.total().matched.tolist(), strict=True)
        classes = ", ".join(f"{name} {count}" for name, count in by_class)
        return [head, "-" * len(head), *rows, f"compared by class: {classes}"]


def verify(
    onnx_path: str | Path,
    checkpoint_path: str | Path,
    samples: Samples,
    *,
    images: int | None = None,
    batch_sizes: Sequence[int] = (1, 3, 8),
    tolerance: Tolerance | None = None,
) -> VerifyReport:
    """Compare a file with the checkpoint it claims to come from, on images.

    The card must be what the checkpoint gives. Then both detect in every image: with the file's
    own thresholds; with thresholds put where every class is seen; and with another IoU threshold
    on top. Detections are matched one to one whatever their order.

    Args:
        onnx_path: The file, run by onnxruntime on the CPU.
        checkpoint_path: The checkpoint, run by torch on the CPU.
        samples: Images, such as a data set's held-out split.
        images: How many of them, spread evenly; all where None.
        batch_sizes: Images a call of the file; too few images are repeated to fill a batch.
        tolerance: How far matched detections may differ; 0.1 px and 1e-4 where None.

    Returns:
        A report; `report.ok` says whether the file stands for the checkpoint.

    Raises:
        CardError: The file breaks its contract, as when its thresholds are not its card's.
        CheckpointError: The checkpoint is missing or damaged.
        ValueError: There are no images, or a batch size is not between 1 and 64.
    """
    count = len(samples) if images is None else min(images, len(samples))
    if count < 1:
        raise ValueError(f"no images to compare on ({len(samples)} given, {images} asked for)")
    if not batch_sizes or any(not 1 <= size <= 64 for size in batch_sizes):
        raise ValueError(f"batch sizes must lie in 1..64, got {tuple(batch_sizes)}")
    file, checkpoint_path = read_detector(onnx_path), Path(checkpoint_path)
    checkpoint = Checkpoint.load(checkpoint_path)
    report = VerifyReport(count, checkpoint.config.class_names)
    report.problems += card_problems(file.card, checkpoint, sha256_of(checkpoint_path))
    if not _comparable(file.card, checkpoint):
        return report
    chosen = [i * len(samples) // count for i in range(count)]
    size = max(GROUP, *batch_sizes)
    try:
        pair = SideBySide(file, checkpoint, tolerance or Tolerance())
        for start in range(0, count, size):
            group = [samples[i] for i in chosen[start : start + size]]
            for key, found in pair.compare(group, batch_sizes).items():
                report.runs.setdefault(key, report.nothing()).add(found)
    except UnrunnableError as fault:
        report.problems.append(str(fault))
        return report
    report.conclude()
    return report


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
            )
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
