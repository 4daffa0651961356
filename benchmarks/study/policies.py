"""F1 of each policy of class-adaptive thresholds, and of one threshold for all classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.result_file import Row
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import Detections, observe
from ghm_triton.evidence import SCORE_BINS, ClassStatistics, ClassThresholds, ThresholdWarning

POLICIES = ("f1", "prior", "precision=0.9", "fixed=0.5")
SINGLE = "single"  # the best one threshold on the held-out split


def choose(held_out: ClassStatistics) -> dict[str, Tensor]:
    """Choose thresholds, float32 `[C]`, by every policy and `SINGLE` from held-out statistics."""
    with warnings.catch_warnings():
        # A method that has not learnt a class has no evidence for it.
        warnings.simplefilter("ignore", ThresholdWarning)
        chosen = {
            policy: torch.from_numpy(ClassThresholds.from_statistics(held_out, policy).as_array())
            for policy in POLICIES
        }
    return {**chosen, SINGLE: torch.full((len(held_out.class_names),), best_single(held_out))}


def best_single(held_out: ClassStatistics) -> float:
    """Choose the lowest threshold for all classes that maximises their mean held-out F1.

    Like the `f1` policy it chooses from the edges of the score histograms except the first.
    """
    curves = []
    for label, truths in enumerate(held_out.ground_truths):
        if truths > 0:
            hits, misses = held_out.reaching(label)
            curves.append(2 * hits / (hits + misses + truths))
    return (int(np.mean(curves, axis=0)[1:-1].argmax()) + 1) / SCORE_BINS


def score(
    thresholds: Tensor, results: Sequence[tuple[Sample, Detections]], class_names: tuple[str, ...]
) -> Row:
    """Macro-F1 of detections at class thresholds: `2 TP / (2 TP + FP + FN)` at IoU 0.5.

    Args:
        thresholds: `[C]`.
        results: Images with all their detections down to the lowest threshold.
        class_names: The classes.

    Returns:
        `macro_f1`, the mean over classes with ground truth; `f1_per_class`, None without; and
        `thresholds`.
    """
    counts = observe(ClassStatistics(class_names), standing(results, thresholds))
    hits, misses = counts.positive_scores.sum(1), counts.negative_scores.sum(1)
    truths = counts.ground_truths
    with np.errstate(invalid="ignore"):
        f1 = (2 * hits / (hits + misses + truths)).tolist()
    known = {
        name: value if truth else None
        for name, value, truth in zip(class_names, f1, truths.tolist(), strict=True)
    }
    there = [value for value in known.values() if value is not None]
    return {
        "macro_f1": sum(there) / len(there) if there else None,
        "f1_per_class": known,
        "thresholds": dict(zip(class_names, thresholds.tolist(), strict=True)),
    }


def standing(
    results: Sequence[tuple[Sample, Detections]], thresholds: Tensor
) -> list[tuple[Sample, Detections]]:
    """Keep the detections whose score reaches the threshold of their class."""
    kept = []
    for sample, found in results:
        stands = found.scores >= thresholds[found.labels]
        kept.append(
            (sample, Detections(found.boxes[stands], found.scores[stands], found.labels[stands]))
        )
    return kept
