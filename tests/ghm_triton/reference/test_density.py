"""From counts to weights, by either implementation, against the loops of the paper."""

import numpy as np
import pytest
import torch

from ghm_triton.reference import RegionCounts

BINS = 6
UNDIVIDED = {"divisor": None, "factor": 1.0}
BATCHES = [
    [5, 0, 3, 1, 0, 90],
    [0, 0, 8, 1, 2, 40],
    [1000000, 7, 0, 0, 0, 1],
    [0, 0, 0, 0, 0, 0],
    [3, 3, 3, 3, 3, 3],
]


def counts_on(device, regions, invalid=0, positives=(0,)):
    return RegionCounts(
        torch.tensor(regions, device=device),
        torch.tensor(positives, dtype=torch.float64, device=device),
        torch.tensor(invalid, device=device),
    )


def new_state(device):
    smoothed = torch.zeros(BINS, device=device)
    return smoothed, torch.zeros((), dtype=torch.int64, device=device)


def truth_of(paper, regions, state, **options):
    """The weight of every region, from as many entries as were counted."""
    norms = np.concatenate([np.full(n, (j + 0.5) / BINS) for j, n in enumerate(regions)] or [[]])
    weights, _ = paper.harmonize(norms, np.ones_like(norms, bool), BINS, state=state, **options)
    starts = np.cumsum([0, *regions[:-1]])
    return [weights[s] if n else 0.0 for s, n in zip(starts, regions, strict=True)]


@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
@pytest.mark.parametrize("normalizer", ["valid_bins", "bins"])
@pytest.mark.parametrize("momentum", [0.0, 0.75, 0.999])
def test_several_batches(paper, device, kernels, ema, normalizer, momentum):
    options = {"momentum": momentum, "ema": ema, "normalizer": normalizer, "max_weight": None}
    check_several_batches(paper, device, kernels, 0.5, options)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("max_weight", [None, 1.3])
def test_strength_and_bound(paper, device, kernels, strength, max_weight):
    options = {"momentum": 0.9, "ema": "debiased", "normalizer": "bins", "max_weight": max_weight}
    check_several_batches(paper, device, kernels, strength, options)


def check_several_batches(paper, device, kernels, strength, options):
    smoothed, updates = new_state(device)
    state = paper.Average(np.zeros(BINS))
    for regions in BATCHES:
        expected = truth_of(paper, regions, state, strength=strength, **options)
        weights, _ = kernels.update_density(
            counts_on(device, regions),
            smoothed,
            updates,
            torch.tensor(strength, device=device),
            persist=True,
            **UNDIVIDED,
            **options,
        )
        paper.assert_close(weights, expected)
        # Each update rounds three times, and what it rounded is in the next.
        paper.assert_close(smoothed, state.smoothed)
        assert int(updates) == state.updates
    assert int(updates) == 4  # the empty batch is none


@pytest.mark.parametrize("invalid", [1, 3])
def test_an_invalid_entry_poisons_the_weights_and_not_the_state(device, kernels, invalid):
    smoothed, updates = new_state(device)
    smoothed += 5
    updates += 3
    weights, _ = kernels.update_density(
        counts_on(device, BATCHES[0], invalid),
        smoothed,
        updates,
        torch.tensor(1.0, device=device),
        momentum=0.5,
        ema="debiased",
        normalizer="bins",
        max_weight=None,
        persist=True,
        **UNDIVIDED,
    )
    assert weights.isnan().all()
    assert smoothed.tolist() == [5.0] * BINS
    assert int(updates) == 3


def test_without_persist_it_weighs_alike_and_stores_nothing(device, kernels):
    results = []
    for persist in (False, True):
        smoothed, updates = new_state(device)
        smoothed += 5
        updates += 3
        weights, _ = kernels.update_density(
            counts_on(device, BATCHES[0]),
            smoothed,
            updates,
            torch.tensor(0.5, device=device),
            momentum=0.5,
            ema="debiased",
            normalizer="bins",
            max_weight=None,
            persist=persist,
            **UNDIVIDED,
        )
        results.append((weights.tolist(), smoothed.tolist(), int(updates)))
    assert results[0][0] == results[1][0]
    assert results[0][1:] == ([5.0] * BINS, 3)
    assert results[1][2] == 4
    assert results[1][1] != [5.0] * BINS


def test_strength_one_and_zero_are_exact(device, kernels):
    odd = np.float32(539) / np.array([3, 10, 61, 129, 17, 319], np.float32) / np.float32(6)
    for regions, strength, expected in (
        ([3] * 6, 1.0, [1.0] * 6),
        ([3, 10, 61, 129, 17, 319], 1.0, odd.tolist()),
        ([4, 9, 0, 1, 0, 0], 0.0, [1.0, 1.0, 0, 1.0, 0, 0]),
    ):
        smoothed, updates = new_state(device)
        weights, _ = kernels.update_density(
            counts_on(device, regions),
            smoothed,
            updates,
            torch.tensor(strength, device=device),
            momentum=0.0,
            ema="debiased",
            normalizer="valid_bins",
            max_weight=None,
            persist=True,
            **UNDIVIDED,
        )
        assert weights.tolist() == expected


@pytest.mark.parametrize(
    ("divisor", "regions", "positives", "expected"),
    [
        (None, BATCHES[0], [7], 3.0),
        ("valid", BATCHES[0], [7], 3.0 / 99),
        ("valid", BATCHES[3], [0], 3.0),  # at least one, so that an empty batch is 0 and not NaN
        ("positives", BATCHES[0], [0.25, 0, 2.25], 3.0 / 2.5),
        ("positives", BATCHES[0], [0.25] * 2, 3.0),
        ("positives", BATCHES[0], [1e-3] * 1000 + [1e9] * 24, 3.0 / (24e9 + 1)),
    ],
)
def test_the_scale_of_the_sum(device, kernels, divisor, regions, positives, expected):
    assert scale_of(device, kernels, divisor, regions, positives) == np.float32(expected)


@pytest.mark.parametrize("divisor", [None, "valid", "positives"])
def test_an_invalid_entry_poisons_the_scale(device, kernels, divisor):
    assert np.isnan(scale_of(device, kernels, divisor, BATCHES[0], [1], invalid=1))


def scale_of(device, kernels, divisor, regions, positives, invalid=0):
    smoothed, updates = new_state(device)
    _, scale = kernels.update_density(
        counts_on(device, regions, invalid, positives),
        smoothed,
        updates,
        torch.tensor(1.0, device=device),
        momentum=0.5,
        ema="debiased",
        normalizer="bins",
        max_weight=None,
        persist=True,
        divisor=divisor,
        factor=3.0,
    )
    assert scale.dtype == torch.float32
    assert scale.shape == ()
    return float(scale)
