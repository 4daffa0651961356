"""Macro-F1 of thresholds, and the best single one, against counting by hand."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.study.policies import POLICIES, SINGLE, best_single, choose, score
from ghm_triton.detection.data import Sample
from ghm_triton.detection.evaluate import Detections
from ghm_triton.evidence import SCORE_BINS, ClassStatistics, ClassThresholds, ThresholdWarning

NAMES = ("cat", "dog", "emu")
BOX = [0.0, 0.0, 10.0, 10.0]
AWAY = [50.0, 50.0, 60.0, 60.0]


def image(truths, found, ignored=()):
    """Make a sample and detections of `(box, label)` and `(box, label, score)`."""
    boxes = torch.tensor([box for box, _ in truths]).reshape(-1, 4)
    labels = torch.tensor([label for _, label in truths], dtype=torch.int64)
    ignore = torch.tensor([i in ignored for i in range(len(truths))], dtype=torch.bool)
    sample = Sample(Image.new("RGB", (64, 64)), boxes, labels, ignore, 0, "an image")
    found = sorted(found, key=lambda one: -one[2])
    return sample, Detections(
        torch.tensor([box for box, _, _ in found]).reshape(-1, 4),
        torch.tensor([score for _, _, score in found]),
        torch.tensor([label for _, label, _ in found], dtype=torch.int64),
    )


RESULTS = [
    image([(BOX, 0), (AWAY, 1)], [(BOX, 0, 0.9), (AWAY, 0, 0.6), (AWAY, 1, 0.3)]),
    image([(BOX, 0)], [(BOX, 0, 0.001)]),
    image([(BOX, 1), (AWAY, 1)], [(BOX, 1, 0.8), (BOX, 1, 0.75)], ignored=(1,)),
]


def test_macro_f1_by_hand():
    found = score(torch.tensor([0.5, 0.5, 0.5]), RESULTS, NAMES)
    # cat: one of two found, one false; dog: one of two found, the second on it is false.
    assert found["f1_per_class"]["cat"] == pytest.approx(2 / (2 + 1 + 1))
    assert found["f1_per_class"]["dog"] == pytest.approx(2 / (2 + 1 + 1))
    assert found["f1_per_class"]["emu"] is None  # there is none to find: no say in the mean
    assert found["macro_f1"] == pytest.approx(0.5)
    assert found["thresholds"] == {"cat": 0.5, "dog": 0.5, "emu": 0.5}


def random_statistics(seed):
    generator = torch.Generator().manual_seed(seed)
    hits = torch.randint(0, 4, (3, SCORE_BINS), generator=generator)
    misses = torch.randint(0, 9, (3, SCORE_BINS), generator=generator)
    misses = misses * (torch.arange(SCORE_BINS) < 60 * torch.arange(1, 4)[:, None])
    truths = hits.sum(1) + 5
    truths[2], hits[2] = 0, 0  # of which there are only false ones
    return ClassStatistics(NAMES, 10_000, torch.tensor([50, 20, 5]), truths, hits, misses)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_single_threshold_is_the_best_of_all(seed):
    statistics = random_statistics(seed)

    def macro_f1(k):
        total = 0.0
        for j in (0, 1):
            hits = int(statistics.positive_scores[j, k:].sum())
            misses = int(statistics.negative_scores[j, k:].sum())
            missed = int(statistics.ground_truths[j]) - hits
            total += 2 * hits / (2 * hits + misses + missed)
        return total / 2

    best = max(range(1, SCORE_BINS), key=macro_f1)  # the first of equals
    assert best_single(statistics) == best / SCORE_BINS
    assert 1 / SCORE_BINS < best_single(statistics) < 1 - 1 / SCORE_BINS


def test_the_single_threshold_is_that_of_all_classes_and_the_policies_their_own():
    statistics = random_statistics(0)
    chosen = choose(statistics)
    assert list(chosen) == [*POLICIES, SINGLE]
    assert chosen[SINGLE].tolist() == pytest.approx([best_single(statistics)] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)
        for policy in POLICIES:
            expected = ClassThresholds.from_statistics(statistics, policy).as_array()
            assert np.array_equal(chosen[policy], expected), policy
