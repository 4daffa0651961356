"""What only the density kernel can get wrong; the arithmetic is tested beside `reference`."""

import pytest
import torch

from ghm_triton import reference

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


@pytest.mark.parametrize("bins", [1, 2, 3, 30, 33, 1000])
@pytest.mark.parametrize("ema", ["debiased", "mmdet"])
def test_it_is_the_reference(device, poisoned, bins, ema):
    from ghm_triton.ops import backend as ops

    generator = torch.Generator().manual_seed(7)
    options = {
        "momentum": 0.7,
        "ema": ema,
        "normalizer": "valid_bins",
        "max_weight": None,
        "divisor": None,
        "factor": 1.0,
    }
    states = [[torch.zeros(bins), torch.zeros((), dtype=torch.int64)] for _ in range(2)]
    states[1] = [tensor.to(device) for tensor in states[1]]
    for _ in range(3):
        regions = torch.randint(0, 5, (bins,), generator=generator)
        weights = []
        for kernels, state in zip((reference, ops), states, strict=True):
            where = state[0].device
            counts = reference.RegionCounts(
                regions.to(where),
                torch.zeros(1, dtype=torch.float64, device=where),
                torch.zeros((), dtype=torch.int64, device=where),
            )
            strength = torch.tensor(0.6, device=where)
            weights.append(
                kernels.update_density(counts, *state, strength, persist=True, **options)[0]
            )
        # exp(s log beta) against a power: an ulp or two of the exponent, about 5 here.
        torch.testing.assert_close(weights[1].cpu(), weights[0], rtol=2e-6, atol=0.0)
        torch.testing.assert_close(states[1][0].cpu(), states[0][0], rtol=2e-7, atol=0.0)
        assert int(states[1][1]) == int(states[0][1])


def test_nothing_is_written_past_the_last_region(device):
    from ghm_triton.ops import backend as ops

    store = torch.full((64,), -7.0, device=device)
    smoothed = store[:5]
    smoothed.zero_()
    counts = reference.RegionCounts(
        torch.full((64,), 9, device=device)[:5],
        torch.zeros(1, dtype=torch.float64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )
    weights, _ = ops.update_density(
        counts,
        smoothed,
        torch.zeros((), dtype=torch.int64, device=device),
        torch.ones((), device=device),
        momentum=0.5,
        ema="debiased",
        normalizer="bins",
        max_weight=None,
        persist=True,
        divisor=None,
        factor=1.0,
    )
    assert weights.tolist() == [1.0] * 5
    assert smoothed.tolist() == [4.5] * 5
    assert store[5:].tolist() == [-7.0] * 59
