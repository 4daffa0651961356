"""Softmax GHM: the spec of the tester, for each density, and what is its own."""

import numpy as np
import pytest
import torch

from ghm_triton import GHMSoftmaxLoss, GradientDensity, ghm_c_loss, ghm_softmax_loss
from tests.ghm_triton.losses.tester import OUTER, WINDOW_KERNEL_TESTS, HarmonizedTester

LABELS = torch.zeros(2, dtype=torch.int64)
ZEROS = torch.zeros(2, 3)


class TestSoftmax(HarmonizedTester):
    function, module, formula = ghm_softmax_loss, GHMSoftmaxLoss, "ghm_softmax"
    rows = True
    cases = {
        **HarmonizedTester.cases,
        "kind": ["index"],
        "average": [None],
        "shape": [(67, 1), (67, 2), (67, 16), (20, 91), (3, 1025), (3, 4096), (2, 3, 5), (5,)],
        "weight_shape": [(2, 30), (30,), (2, 1), ()],
        "empty": [(0, 5), (2, 0, 5)],
        "bad_tensors": [
            (TypeError, "logits must be a tensor, got list", ([1.0], torch.zeros(1))),
            (TypeError, "logits must be float32", (ZEROS.int(), LABELS)),
            (ValueError, r"C of at least 1, got \[\]", (torch.zeros(()), torch.zeros(()).int())),
            (ValueError, r"got \[2, 0\]", (torch.zeros(2, 0), LABELS)),
            (ValueError, r"target must be integer \[2\]", (ZEROS, torch.zeros(2))),
            (ValueError, r"got torch.int64 \[3\]", (ZEROS, torch.zeros(3).long())),
            (ValueError, r"got torch.bool \[2\]", (ZEROS, torch.zeros(2).bool())),
            (
                ValueError,
                r"label_weight \[2, 3\] does not broadcast to \[2\]",
                (ZEROS, LABELS, torch.zeros(2, 3)),
            ),
            (
                ValueError,
                r"label_weight must lie in \[0, inf\]; got -1 to -1",
                (ZEROS, LABELS, -torch.ones(2)),
            ),
            (ValueError, "target is on meta, the predictions on cpu", (ZEROS, LABELS.to("meta"))),
        ],
        "bad_options": [
            *HarmonizedTester.cases["bad_options"],
            ("'unit_region' or 'streaming', not 'exact'", {"density": "exact"}),
            ("not 'exact'", {"state": GradientDensity(10, density="exact")}),
        ],
        "bad_modules": [
            *HarmonizedTester.cases["bad_modules"],
            ("unit_region, streaming; got 'exact'", {"density": "exact"}),
        ],
    }

    def draw(self, kind, shape, dtype=torch.float32, spread=4.0, ignored=True, **options):
        low = -1 if ignored and len(shape) > 1 else 0
        index = torch.randint(low, shape[-1], shape[:-1], generator=self.generator)
        given = (options.get("bins", 30), self.generator, spread, self.density)
        return self.paper.draw_rows(shape, index, dtype, *given), index

    def tolerance(self, values, target, truth, options):
        ulps = self.paper.FLOAT32_ULPS
        if options.get("density") == "streaming":
            # A window is 1 / (2 M) long at least; a norm at 1 is off by 2 steps of float32.
            ulps += 4 * options.get("bins", 30)
        return 0.0, 0.0, ulps

    def wrong_targets(self, target):
        message = r"class index {}, but logits have 3 classes \(0..2, negative ignored\)"
        return [((3,), torch.tensor(w), message.format(w)) for w in (3, 4, 2**40)]

    def test_strength_zero_is_cross_entropy(self):
        logits, index = self.draw("index", (2, 40, 3))
        x = logits.to(self.device).requires_grad_()
        labels = index.to(self.device)
        theirs = torch.nn.functional.cross_entropy(x.mT, labels, ignore_index=-1)
        (slope,) = torch.autograd.grad(theirs * OUTER, x)
        loss, ours = self.call(logits.to(self.device), index, strength=0.0)
        torch.testing.assert_close(loss, theirs.detach())
        torch.testing.assert_close(ours, slope)

    @pytest.mark.parametrize("strength", [0.0, 1.0])
    def test_two_classes_are_one_sigmoid(self, strength):
        """`1 - p_y` of two classes is `|sigmoid(x_0 - x_1) - p*|`, and so is the rest."""
        logits, index = self.draw("index", (60, 2))
        logits = logits.round(decimals=2).to(self.device)
        options = {"strength": strength, "density": self.density}
        loss, slope = self.call(logits, index, **options)
        # Class 0, or background.
        single = (logits[:, :1] - logits[:, 1:]).detach().requires_grad_()
        sigmoid = ghm_c_loss(single, index.to(self.device), backend=self.backend, **options)
        (expected,) = torch.autograd.grad(sigmoid * OUTER, single)
        # float32 either way; the difference is rounded before the one and within the other.
        torch.testing.assert_close(loss, sigmoid.detach(), rtol=1e-5, atol=0)
        both = torch.cat([expected, -expected], dim=1)
        torch.testing.assert_close(slope, both, rtol=1e-5, atol=0)

    def test_small_and_large_losses_keep_their_digits(self):
        # Integers, so that the difference is exact and its exponential alone is rounded.
        gaps = torch.tensor([0.0, 1.0, 5.0, 17.0, 40.0, 60.0])
        logits, index = torch.zeros(24, 3), torch.arange(24) % 3
        for row, gap in enumerate(torch.cat([gaps, -gaps, gaps, -gaps])):
            logits[row, int(index[row])] = gap
        logits[12:] -= 1000
        self.check(logits, index, strength=0.0, reduction="none")

    @pytest.mark.parametrize("strength", [0.0, 1.0])
    @pytest.mark.parametrize("classes", [2, 5])
    def test_huge_logits(self, classes, strength):
        index = torch.arange(40) % classes
        logits = torch.randint(-1, 2, (40, classes), generator=self.generator) * 1e4
        logits[::3] += torch.randn(14, classes, generator=self.generator).round(decimals=3)
        logits = logits.float()
        norms = self.paper.softmax_parts(self.paper.as_numpy(logits), index.numpy())[2]
        assert self.paper.away_from_edges(norms, 7).all()
        assert (norms == 0).any()
        assert (norms == 1).any()
        options = {"density": "unit_region", "strength": strength, "bins": 7}
        self.check(logits, index, reduction="none", **options)

    def test_classes_masked_by_the_smallest_number(self):
        logits, index = self.draw("index", (30, 4))
        masked = torch.full((30, 2), torch.finfo(torch.float32).min)
        self.check(torch.cat([logits, masked], dim=1), index)

    def test_edges_and_ends(self):
        # Equal logits have p of exactly 1 / C: 1/2 and 3/4 are edges, and an edge opens its region.
        low = -1e4
        logits = torch.tensor(
            [[0, 0, low, low], [0, 0, 0, 0], [0, low, low, low], [low, 0, 0, 0.0], [low, 0, 0, low]]
        )
        index = torch.zeros(5, dtype=torch.int64)
        assert self.paper.ghm_softmax(logits, index, bins=4).counts == [1, 0, 1, 3]
        self.check(logits, index, bins=4, reduction="none", density="unit_region")

    def test_float16_gradients_do_not_underflow_under_a_loss_scale(self):
        # As for GHM-C: 1 / N times the slope is below 6e-8, and times a loss scale of 65,536 not.
        logits = torch.zeros(3000, 2, dtype=torch.float16, device=self.device)
        logits[:, 0] = 8.0
        logits.requires_grad_()
        index = torch.zeros(3000, dtype=torch.int64, device=self.device)
        loss = ghm_softmax_loss(logits, index, strength=0.0, backend=self.backend)
        (loss * 65536.0).backward()
        expected = 65536.0 / 3000 / (1 + np.exp(8.0))
        slope = logits.grad.float().cpu().numpy()
        np.testing.assert_allclose(slope, [[-expected, expected]] * 3000, rtol=1e-3)  # its eps

    @pytest.mark.kernels
    def test_more_classes_than_a_tile_holds(self, kernels_run):
        logits = torch.randn(2, 4097, generator=self.generator).to(self.device)
        index = torch.tensor([5, 4096], device=self.device)
        with pytest.raises(ValueError, match="up to 4096 classes, got 4097; use backend='torch'"):
            ghm_softmax_loss(logits, index, backend="triton")
        loss = ghm_softmax_loss(logits, index)
        assert torch.equal(loss, ghm_softmax_loss(logits, index, backend="torch"))


class TestSoftmaxStreaming(TestSoftmax):
    density = "streaming"
    kernel_tests = WINDOW_KERNEL_TESTS
    cases = {**TestSoftmax.cases, "shape": [(67, 2), (2, 3, 5)]}
    test_tensors_that_are_refused = None
    test_options_that_are_refused = None
    test_modules_refuse_options_at_once = None
