"""GHM-C: the spec of the tester, for each density, and what is its own."""

import numpy as np
import pytest
import torch

from ghm_triton import GHMCLoss, ghm_c_loss
from tests.ghm_triton.losses.tester import OUTER, WINDOW_KERNEL_TESTS, HarmonizedTester

ZEROS = torch.zeros(2, 3)


class TestGHMC(HarmonizedTester):
    function, module, formula = ghm_c_loss, GHMCLoss, "ghm_c"
    cases = {
        **HarmonizedTester.cases,
        "bad_tensors": [
            (TypeError, "logits must be a tensor, got list", ([1.0], torch.zeros(1))),
            (TypeError, "logits must be float32", (torch.zeros(2, dtype=int), torch.zeros(2))),
            (ValueError, "at least one dimension", (torch.zeros(()), torch.zeros(()))),
            (TypeError, "target must be a tensor, got int", (ZEROS, 1)),
            (ValueError, r"integer \[2\]", (ZEROS, torch.zeros(3))),
            (ValueError, r"got torch.float32 \[2\]", (ZEROS, torch.zeros(2))),
            (
                ValueError,
                r"label_weight \[2\] does not broadcast to \[2, 3\]",
                (ZEROS, ZEROS, torch.zeros(2)),
            ),
            (
                ValueError,
                r"label_weight must lie in \[0, inf\]; got -1 to -1",
                (ZEROS, ZEROS, -torch.ones(3)),
            ),
            (
                ValueError,
                "label_weight is on meta, the predictions on cpu",
                (ZEROS, ZEROS, torch.ones(3, device="meta")),
            ),
            (
                TypeError,
                "label_weight must be real",
                (ZEROS, ZEROS, torch.ones(3, dtype=torch.complex64)),
            ),
        ],
        "bad_options": [
            *HarmonizedTester.cases["bad_options"],
            ("average must be one of valid, positives; got 'x'", {"average": "x"}),
        ],
        "bad_modules": [
            *HarmonizedTester.cases["bad_modules"],
            ("average must be one of", {"average": "x"}),
            ("takes no process_group", {"density": "exact", "process_group": object()}),
        ],
    }

    def draw(self, kind, shape, dtype=torch.float32, spread=4.0, ignored=True, **options):
        if kind == "index":
            low = -1 if ignored else 0
            target = torch.randint(low, shape[-1] + 1, shape[:-1], generator=self.generator)
        else:
            target = torch.rand(shape, generator=self.generator)
            target = target < 0.2 if kind == "bool" else target
        bins = options.get("bins", 30)
        given = (bins, self.generator, spread, self.density)
        return self.paper.draw_logits(shape, target, dtype, *given), target

    def tolerance(self, values, target, truth, options):
        cancelled = self.paper.cancellation(values, target)
        relative = 0.0
        if options.get("density") == "exact":
            # A window is 1 / (2 M) long at least; norms next to 1 are off by 2 steps of float32.
            relative = 2 * options.get("bins", 30) * (2 * self.paper.EPS32 + cancelled)
        return truth.weights * cancelled, relative, self.paper.FLOAT32_ULPS

    def wrong_targets(self, target):
        if target.is_floating_point() or target.dtype == torch.bool:
            place = (3, 1)
            wrong = (1.5, -0.1, torch.nan)
            return [(place, torch.tensor(w), r"target must lie in \[0, 1\]") for w in wrong]
        message = r"class index {}, but logits have 3 classes \(0..2, background 3, negative ig"
        return [((3,), torch.tensor(w), message.format(w)) for w in (4, 2**40)]

    def test_a_vector_and_a_single_index(self):
        self.check(*self.draw("soft", (77,)))
        index = torch.tensor(2)  # of one sample: the vector is its row
        given = (torch.float32, 30, self.generator)
        self.check(self.paper.draw_logits((5,), index, *given), index)

    def test_strength_zero_is_cross_entropy(self):
        logits = (torch.randn(40, 3, generator=self.generator) * 4).to(self.device)
        target = torch.rand(40, 3, generator=self.generator)
        x = logits.clone().requires_grad_()
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(x, target.to(self.device))
        (slope,) = torch.autograd.grad(theirs * OUTER, x)
        loss, ours = self.call(logits, target, strength=0.0)
        torch.testing.assert_close(loss, theirs.detach())
        torch.testing.assert_close(ours, slope)

    def test_hard_dense_targets_are_index_targets(self):
        logits, index = self.draw("index", (60, 4), ignored=False)
        dense = torch.nn.functional.one_hot(index, 5)[:, :4].float()
        logits = logits.to(self.device)
        torch.testing.assert_close(self.call(logits, index), self.call(logits, dense))

    @pytest.mark.parametrize("positives", [0.0, 0.25, 1.0, 1.5])
    def test_positives_below_one_count_as_one(self, positives):
        logits, target = torch.zeros(10, 1, device=self.device), torch.zeros(10, 1)
        target[:2] = positives / 2
        mean, _ = self.call(logits, target, average="positives", strength=0.0)
        whole, _ = self.call(logits, target, reduction="sum", strength=0.0)
        assert float(mean) == pytest.approx(float(whole) / max(positives, 1.0), rel=1e-6)

    @pytest.mark.parametrize("logit", [-1e4, 0.7, 1e4])
    def test_one_norm_for_all(self, logit):
        self.check(torch.full((50, 3), logit), torch.zeros(50, dtype=torch.int64))

    def test_edges_and_ends(self):
        # p = 1/2 exactly, so g = p* is 0 and 1/4, 1/2, 3/4 are edges: an edge opens its region.
        # Logits of +-1e4 have g of exactly 0 and 1; 1 belongs to the last region.
        logits = torch.tensor([0.0, 0.0, 0.0, 1e4, -1e4, 1e4, -1e4])
        target = torch.tensor([0.5, 0.25, 0.0, 1.0, 0.0, 0.0, 1.0])
        assert self.paper.ghm_c(logits, target, bins=4).counts == [3, 1, 1, 2]
        self.check(logits, target, bins=4)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_a_weight_of_zero_of_either_sign_ignores_and_any_other_keeps(self, dtype):
        if self.device.type == "cpu" and self.backend == "triton" and dtype == torch.bfloat16:
            pytest.skip("the interpreter compares the bits of bfloat16, where -0.0 is 32,768")
        info, x = torch.finfo(dtype), torch.zeros(4, 1, device=self.device)
        weight = torch.tensor([0.0, -0.0, info.tiny, info.max], dtype=dtype).unsqueeze(1)
        loss, slope = self.call(x, torch.zeros(4, 1), weight, reduction="none", strength=0.0)
        log2 = np.log(2)
        assert loss.flatten().tolist() == pytest.approx([0, 0, log2, log2], rel=1e-6)
        assert slope.flatten().tolist() == pytest.approx([0, 0, OUTER / 2, OUTER / 2], rel=1e-6)

    def test_counts_beyond_float16(self):
        criterion = self.make(strength=1.0).half()
        logits = torch.zeros(70_000, 1, dtype=torch.float16, device=self.device)
        loss, _ = self.call(logits, torch.zeros(70_000, dtype=torch.int64), loss=criterion)
        # g is 1/2 at the single entry of each row: one region, so plain cross entropy log 2.
        assert float(loss) == pytest.approx(np.log(2), rel=1e-5)
        assert float(criterion.density.smoothed.max()) == pytest.approx(0.25 * 70_000)


class Windows(TestGHMC):
    """Fewer options than unit regions: there is no normalizer."""

    __test__ = False
    test_counts_beyond_float16 = None  # they are not counted in the regions of above
    cases = {
        **TestGHMC.cases,
        "kind": ["index", "soft"],
        "options": [
            {"strength": 0.0},
            {"strength": 0.25},
            {"max_weight": 0.9},
            {"max_weight": 0.9, "strength": 0.5},
            {"bins": 1},
            {"bins": 7, "normalizer": "bins"},
            {"bins": 100},
        ],
        "shape": [(20, 3), (2, 20, 5)],
        "weight_shape": [(30, 5), (30, 1), (2, 1, 1)],
        "layout": ["transposed", "channels"],
    }
    test_tensors_that_are_refused = None
    test_options_that_are_refused = None
    test_modules_refuse_options_at_once = None


class TestGHMCExact(Windows):
    __test__ = True
    density = "exact"
    kernel_tests = WINDOW_KERNEL_TESTS
    test_a_group_of_one_changes_nothing = None  # takes no process group

    def test_edges_and_ends(self):
        # g = |1/2 - p*| is 0, 1/8 and so on, which lie on the edges of windows of 1/4.
        target = torch.tensor([0.5, 0.375, 0.25, 0.25, 0.125, 0.0, 0.625, 1.0, 0.0, 0.0, 1.0])
        logits = torch.zeros(11)
        logits[7:] = torch.tensor([1e4, -1e4, 1e4, -1e4])
        norms = np.array([0, 1, 2, 2, 3, 4, 1, 0, 0, 8, 8]) / 8
        counted = self.paper.exact_density(norms, np.ones(11, bool), 4)
        assert counted.tolist() == [24, 5 / 0.25, 16, 16, 12, 8, 5 / 0.25, 24, 24, 16, 16]
        self.check(logits, target, bins=4)


class TestGHMCStreaming(Windows):
    __test__ = True
    density = "streaming"
    kernel_tests = WINDOW_KERNEL_TESTS
    test_edges_and_ends = None  # fine regions have edges of their own
