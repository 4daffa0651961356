"""GHM-R: the spec of the tester, for each density, and what is its own."""

import pytest
import torch

from ghm_triton import GHMRLoss, ghm_r_loss
from tests.ghm_triton.losses.tester import WINDOW_KERNEL_TESTS, HarmonizedTester


class TestGHMR(HarmonizedTester):
    function, module, formula = ghm_r_loss, GHMRLoss, "ghm_r"
    momentum, default_bins = 0.7, 10
    cases = {
        **HarmonizedTester.cases,
        "kind": ["deltas"],
        "average": [None],
        "options": [
            {"mu": 0.5},
            {"mu": 1e-4, "bins": 3},
            {"strength": 0.25},
            {"normalizer": "bins", "max_weight": 0.5},
            {"bins": 1},
            {"bins": 64},
        ],
        "shape": [(33,), (7, 3), (131, 4), (2, 5, 4)],
        "empty": [(0, 4), (0,), (3, 0)],
        "bad_tensors": [
            (ValueError, r"pred is \[2\], target \[3\]", (torch.zeros(2), torch.zeros(3))),
            (
                TypeError,
                r"target must be.*got torch.int64",
                (torch.zeros(2), torch.zeros(2).long()),
            ),
            (ValueError, "at least one dimension", (torch.zeros(()), torch.zeros(()))),
            (
                ValueError,
                r"label_weight must lie in \[0, inf\]; got nan",
                (torch.zeros(2), torch.zeros(2), torch.tensor([1.0, torch.nan])),
            ),
        ],
        "bad_options": [
            *HarmonizedTester.cases["bad_options"],
            ("mu must be positive, got 0", {"mu": 0}),
        ],
        "bad_modules": [
            *HarmonizedTester.cases["bad_modules"],
            ("mu must be positive, got 0", {"mu": 0}),
            ("takes no process_group", {"density": "exact", "process_group": object()}),
        ],
    }
    test_class_indices_of_any_dtype = None  # there are none

    def draw(self, kind, shape, dtype=torch.float32, spread=None, ignored=True, **options):
        mu, bins = options.get("mu", 0.02), options.get("bins", 10)
        target = (torch.randn(shape, generator=self.generator) * 0.1).to(dtype)
        if "mu" in options:
            target = torch.zeros(shape)
        spread = 2 * mu if "mu" in options else 0.1 if spread is None else 0.02 * spread
        given = (dtype, bins, mu, self.generator, spread, self.density)
        return self.paper.draw_pred(target, *given), target

    def tolerance(self, values, target, truth, options):
        relative = 0.0
        if options.get("density") == "exact":  # of a hypotenuse and a division, next to 1
            relative = 2 * options.get("bins", 10) * 4 * self.paper.EPS32
        return 0.0, relative, self.paper.FLOAT32_ULPS

    def wrong_targets(self, target):
        return []  # every finite number is one; others are predictions that are not finite

    def test_no_difference_and_huge_ones(self):
        # g of 0 opens the first region; the squares of 1e30 would overflow; g rounds to 1.
        pred = torch.tensor([0.0, 1e-20, 1e4, -1e4, 1e30, -1e37])
        self.check(pred, torch.zeros(6), reduction="none")

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_a_target_that_is_not_finite_makes_the_loss_nan(self, poison):
        pred, target = self.draw("deltas", (30, 4))
        target[4] = poison
        assert self.call(pred.to(self.device), target)[0].isnan()


class TestGHMRExact(TestGHMR):
    density = "exact"
    kernel_tests = WINDOW_KERNEL_TESTS
    test_tensors_that_are_refused = None
    test_options_that_are_refused = None
    test_modules_refuse_options_at_once = None
    test_a_group_of_one_changes_nothing = None  # takes no process group


class TestGHMRStreaming(TestGHMR):
    density = "streaming"
    kernel_tests = WINDOW_KERNEL_TESTS
    test_tensors_that_are_refused = None
    test_options_that_are_refused = None
    test_modules_refuse_options_at_once = None
