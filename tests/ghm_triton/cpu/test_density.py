"""The weights of the unit regions in numpy, against the specification."""

import itertools

import pytest
import torch

from ghm_triton.cpu.density import update_density
from ghm_triton.reference import density
from ghm_triton.reference.interface import RegionCounts

BATCHES = [[5, 0, 3, 90], [0, 0, 8, 2**40], [0, 0, 0, 0], [1, 1, 1, 1], [0, 7, 0, 0]]
OPTIONS = itertools.product(
    [0.0, 0.75, 0.999],
    ["debiased", "mmdet"],
    ["valid_bins", "bins"],
    [None, 1.3],
    [None, "valid", "positives"],
)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("invalid", [0, 3])
def test_it_is_the_specification(strength, invalid):
    for momentum, ema, normalizer, max_weight, divisor in OPTIONS:
        options = {
            "momentum": momentum,
            "ema": ema,
            "normalizer": normalizer,
            "max_weight": max_weight,
            "divisor": divisor,
            "factor": 3.0,
        }
        states = [(torch.zeros(4), torch.zeros((), dtype=torch.int64)) for _ in range(2)]
        for regions, persist in zip(BATCHES, (True, True, True, False, True), strict=True):
            counts = RegionCounts(
                torch.tensor(regions),
                torch.tensor([0.25, 1e9], dtype=torch.float64),
                torch.tensor(invalid if regions[0] == 0 else 0),
            )
            results = [
                update(counts, *state, torch.tensor(strength), persist=persist, **options)
                for update, state in zip(
                    (update_density, density.update_density), states, strict=True
                )
            ]
            for ours, theirs in zip(*results, strict=True):
                # A power, which each library rounds its own way, and three divisions.
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0, equal_nan=True)
            assert torch.equal(states[0][0], states[1][0])
            assert torch.equal(states[0][1], states[1][1])


def test_a_scale_that_float32_does_not_hold_is_infinite_without_a_warning():
    counts = RegionCounts(torch.ones(2, dtype=torch.int64), torch.zeros(1), torch.tensor(0))
    state = torch.zeros(2), torch.zeros((), dtype=torch.int64)
    options = {"momentum": 0.0, "ema": "debiased", "normalizer": "bins", "max_weight": None}
    _, scale = update_density(
        counts, *state, torch.tensor(1.0), persist=False, divisor=None, factor=1e39, **options
    )
    assert scale == torch.inf
