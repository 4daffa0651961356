"""Train one run and measure everything that the study's tables and figures need."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import provenance
from benchmarks.result_file import Row
from benchmarks.study.plan import Run
from benchmarks.study.policies import choose, score, standing
from benchmarks.study.report.gradients import focal_negative, focal_positive
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.evaluate import (
    MeanAveragePrecision,
    detect,
    mean_average_precision,
    torch_predictor,
)
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.plots import gradient_norms_by_target
from ghm_triton.detection.training.build import open_split
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.hooks import METRICS
from ghm_triton.detection.training.loop import TrainResult, train
from ghm_triton.evidence import SCORE_FLOOR, ClassStatistics

TEST = "test"
DENSE = ("retinanet", "fcos")
CURVES = ("classification", "unguided_classification", "bbox_regression", "grad_norm")
POINTS = 60  # maximum per curve
BINS = 30  # per histogram of gradient norms
IMAGES = 128  # per histogram


def measure(run: Run) -> Row:
    """Train and measure a run; return the row of the result file.

    Raises:
        ValueError: The data set cannot be opened, or an option is incompatible with it.
        TrainingError: The loss or the gradient is not finite.
    """
    origin, started = _origin(), time.perf_counter()
    options = run.options
    names = open_dataset(options.data, options.train_split).class_names
    config = replace(run.config, class_names=names)
    with tempfile.TemporaryDirectory() as folder:
        result = train(options, config, Path(folder), progress=False)
        seconds = time.perf_counter() - started
        curves = _curves(Path(folder) / METRICS)
        saved = Checkpoint.load(result.checkpoint)
    detector = saved.detector().to("cuda" if torch.cuda.is_available() else "cpu")
    results = {
        **_tested(run, detector, saved.statistics),
        **_timed(result, seconds),
        "curves": curves,
        "gradient_norms": _gradient_norms(run, detector),
        "total_seconds": round(time.perf_counter() - started, 1),
    }
    # The head is not rounded: the row is looked up by it.
    return {**run.head(), **{name: plain(value) for name, value in results.items()}, **origin}


@cache
def _origin() -> Row:
    # Cached: the code of this process, even if the files change meanwhile.
    return provenance()


def plain(value: Any) -> Any:
    """Convert to JSON values: NaN and infinities to None, numbers to 6 digits."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _timed(result: TrainResult, seconds: float) -> Row:
    held_out = result.held_out.ap if result.held_out else math.nan
    return {
        "val_ap": held_out,
        "seconds": round(seconds, 1),
        "step_ms": 1000 * statistics.median(result.step_seconds),
    }


def _tested(run: Run, detector: Detector, held_out: ClassStatistics) -> Row:
    """Average precision on the test split, and macro-F1 of every policy."""
    names = detector.config.class_names
    thresholds = choose(held_out)
    # One pass is enough for all: lower scores neither suppress nor displace higher ones, unless an
    # image has `max_detections`.
    floor = torch.stack([torch.full((len(names),), SCORE_FLOOR), *thresholds.values()]).amin(0)
    test = open_split(run.options, TEST, names)
    predict = torch_predictor(DeployedDetector(detector), floor)
    results = list(detect(predict, detector.config, test))
    recorded = standing(results, torch.full_like(floor, SCORE_FLOOR))  # as `ghm eval` has it
    return {
        **_precision(mean_average_precision(names, recorded)),
        "policies": {name: score(line, results, names) for name, line in thresholds.items()},
    }


def _precision(found: MeanAveragePrecision) -> Row:
    return {
        "ap": found.ap,
        "ap50": found.ap50,
        "ap75": found.ap75,
        "ap_per_class": {name: list(pair) for name, pair in found.per_class.items()},
    }


def _curves(metrics: Path) -> Row:
    """Means over equal stretches of steps; `step` is the number of steps at a stretch's end.

    The classification loss before the guide scales it has its own curve.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    ends = stretches(len(lines))
    curves: Row = {"step": ends}
    for name in CURVES:
        if name not in lines[0]:
            continue
        values = [line[name] for line in lines]
        curves[name] = [
            statistics.fmean(values[start:end])
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
    return curves


def stretches(steps: int, points: int = POINTS) -> list[int]:
    """Ends of equal stretches of steps, at most `points`."""
    count = min(steps, points)
    return [round((i + 1) * steps / count) for i in range(count)]


def _gradient_norms(run: Run, detector: Detector) -> Row | None:
    if detector.config.architecture not in DENSE:
        return None
    seen = open_split(run.options, run.options.train_split, detector.config.class_names)
    positives, negatives = gradient_norms_by_target(detector, seen, IMAGES)
    return {
        "positives": histogram(positives),
        "negatives": histogram(negatives),
        "gradients": gradients(positives, negatives),
    }


def gradients(positives: Tensor, negatives: Tensor, bins: int = BINS) -> dict[str, list[float]]:
    """Sum the logits' gradients in equal bins of the norm, by loss.

    Counts are not enough: most entries of the first bin are far below its middle.
    """
    sides = [norms.double() for norms in (positives, negatives)]
    regions = torch.cat([_region(norms, bins) for norms in sides])
    of_loss = {
        "ce": torch.cat(sides),
        "focal": torch.cat(
            [
                torch.from_numpy(gradient(norms.numpy()))
                for gradient, norms in zip((focal_positive, focal_negative), sides, strict=True)
            ]
        ),
    }
    return {
        name: torch.zeros(bins, dtype=torch.float64).index_add_(0, regions, heard).tolist()
        for name, heard in of_loss.items()
    }


def _region(norms: Tensor, bins: int) -> Tensor:
    return (norms.double() * bins).long().clamp(max=bins - 1)


def histogram(norms: Tensor, bins: int = BINS) -> Sequence[int]:
    """Count the norms in equal bins of [0, 1], the last one closed."""
    counts: list[int] = torch.bincount(_region(norms, bins), minlength=bins).tolist()
    return counts
