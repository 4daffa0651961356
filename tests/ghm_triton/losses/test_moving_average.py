"""Weights by the moving average: its first steps, and a region hit after a long time."""

import math

import pytest
import torch

from ghm_triton import GHMCLoss

ULPS = 1e-6  # relative, of float32: a handful of roundings
LOG2 = math.log(2)  # the cross entropy of a logit of 0, whatever the target


def at_norms(counts, device):
    """Logits of 0 and targets that put so many entries into the regions [0, 1/2) and [1/2, 1]."""
    below, above = counts
    target = torch.tensor([0.25] * below + [1.0] * above, device=device).unsqueeze(1)
    return torch.zeros_like(target), target


def weights(criterion, counts, device):
    """The weights of the two regions in a training step; 0 where empty."""
    loss = criterion(*at_norms(counts, device)).flatten() / LOG2
    below, above = counts
    assert loss[:below].unique().numel() == (below > 0)
    return [float(loss[0]) if below else 0.0, float(loss[-1]) if above else 0.0]


class TestInHardCases:
    def test_the_first_steps(self, device, backend):
        """Counts (6, 2), (2, 6), (8, 0) at momentum 1/2; by hand."""
        batches = [(6, 2), (2, 6), (8, 0)]
        expected = {
            # S of (3, 1), (5/2, 7/2), (21/4, 7/4), divided by 1/2, 3/4, 7/8.
            "debiased": [[2 / 3, 2], [6 / 5, 6 / 7], [4 / 3, 0]],
            # S of (3, 1), (5/2, 7/2), (21/4, 7/2): undivided, and the empty region stays.
            "mmdet": [[4 / 3, 4], [8 / 5, 8 / 7], [32 / 21, 0]],
        }
        for ema, by_step in expected.items():
            criterion = GHMCLoss(
                2, 0.5, strength=1.0, ema=ema, reduction="none", backend=backend
            ).to(device)
            for counts, weight in zip(batches, by_step, strict=True):
                assert weights(criterion, counts, device) == pytest.approx(weight, rel=ULPS)

    @pytest.mark.parametrize("ema", ["debiased", "mmdet"])
    def test_a_region_hit_after_a_long_time(self, device, backend, ema):
        options = {"ema": ema, "reduction": "none", "backend": backend}
        momentum, empty = 0.75, 3
        once, bounded, milder = (
            GHMCLoss(2, momentum, **options, **more).to(device)
            for more in ({"strength": 1.0}, {"strength": 1.0, "max_weight": 10.0}, {})
        )
        for criterion in (once, bounded, milder):
            weights(criterion, (60, 4), device)
            for _ in range(empty):
                weights(criterion, (64, 0), device)
        if ema == "debiased":  # decayed
            average = (
                (1 - momentum) * (4 * momentum ** (empty + 1) + 1) / (1 - momentum ** (empty + 2))
            )
        else:  # as it was, moved on once
            average = momentum * (1 - momentum) * 4 + (1 - momentum)
        expected = 64 / average / 2
        assert weights(once, (63, 1), device)[1] == pytest.approx(expected, rel=ULPS)
        assert weights(bounded, (63, 1), device)[1] == 10.0
        assert weights(milder, (63, 1), device)[1] == pytest.approx(expected**0.25, rel=ULPS)
        # For ever: what has decayed to the smallest number, or to nothing, weighs N / ((1 - a) n).
        for left in (1e-45, 0.0):
            state = {"smoothed": torch.tensor([64.0, left]), "updates": torch.tensor(10_000)}
            once.density.load_state_dict(state)
            assert weights(once, (63, 1), device)[1] == 64 / (1 - momentum) / 2
