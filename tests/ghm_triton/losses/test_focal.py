"""Focal loss: the spec of the tester, and what is its own."""

import numpy as np
import pytest
import torch

from ghm_triton import FocalLoss, focal_loss
from tests.ghm_triton.losses.tester import LossTester, torch_only


class TestFocal(LossTester):
    function, module, formula = focal_loss, FocalLoss, "focal"
    average = "positives"
    cases = {
        **LossTester.cases,
        "kind": ["index", "hard", "soft", "bool"],
        "options": [
            {"alpha": alpha, "gamma": gamma}
            for alpha, gamma in [(0, 2), (1, 1.0), (0.25, 0), (0.4, 0.5), (0.25, 1.5), (0.9, 5)]
        ],
        "bad_tensors": [
            (TypeError, "logits must be float32", (torch.zeros(2).int(), torch.zeros(2))),
            (ValueError, r"got torch.float32 \[3\]", (torch.zeros(2), torch.zeros(3))),
        ],
        "bad_options": [
            (r"alpha must lie in \[0, 1\], got 2", {"alpha": 2}),
            (r"alpha must lie in \[0, 1\], got nan", {"alpha": float("nan")}),
            ("gamma must be at least 0, got -1", {"gamma": -1}),
            ("gamma must be at least 0, got nan", {"gamma": float("nan")}),
            ("average must be one of valid, positives; got 'x'", {"average": "x"}),
            ("reduction must be one of mean, sum, none; got 'x'", {"reduction": "x"}),
            ("backend must be one of auto, triton, torch; got 'x'", {"backend": "x"}),
        ],
    }
    cases["bad_modules"] = cases["bad_options"]

    def draw(self, kind, shape, dtype=torch.float32, spread=4.0, ignored=True, **options):
        logits = (torch.randn(shape, generator=self.generator) * spread).to(dtype)
        if kind == "index":
            low = -1 if ignored else 0
            return logits, torch.randint(low, shape[-1] + 1, shape[:-1], generator=self.generator)
        soft = torch.rand(shape, generator=self.generator)
        return logits, {"soft": soft, "bool": soft < 0.2, "hard": (soft < 0.2).float()}[kind]

    def tolerance(self, values, target, truth, options):
        # A soft target's two slopes cancel: to a few ulps of either, below 2 up to a gamma of 2.
        lost = truth.weights * 8 * self.paper.EPS32 * float(self.paper.is_dense(target))
        # `q^gamma` is an exponential of `-gamma |x|`, to an ulp of that; beyond 110 it is 0.
        numbers = self.paper.as_numpy(values)
        largest = float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0))
        ulps = self.paper.FLOAT32_ULPS + 2 * options.get("gamma", 2.0) * min(largest, 110.0)
        return lost, 0.0, ulps

    def wrong_targets(self, target):
        if target.is_floating_point() or target.dtype == torch.bool:
            wrong = (1.5, -0.1, torch.nan)
            return [((3, 1), torch.tensor(w), r"target must lie in \[0, 1\]") for w in wrong]
        message = "class index {}, but logits have 3"
        return [((3,), torch.tensor(w), message.format(w)) for w in (4, 2**40)]

    def test_a_vector_and_a_single_index(self):
        self.check(*self.draw("soft", (77,)))
        logits, _ = self.draw("soft", (5,))
        self.check(logits, torch.tensor(2))  # of one sample: the vector is its row

    @torch_only
    def test_float64_is_exact(self):
        logits, target = self.draw("soft", (40, 3), torch.float64)
        loss, slope = self.call(logits, target.double(), gamma=1.5)
        truth = self.paper.focal(logits, target, gamma=1.5)
        scale = truth.scale("mean", "positives")
        # No float32 anywhere: a billionth of its step.
        assert loss.item() == pytest.approx(truth.entries.sum() * scale, rel=1e-14)
        expected = truth.slopes * scale * 3.7
        np.testing.assert_allclose(self.paper.as_numpy(slope), expected, rtol=1e-12, atol=1e-14)

    def test_gamma_zero_is_cross_entropy(self):
        logits, target = (t.to(self.device) for t in self.draw("soft", (40, 3)))
        options = {"alpha": 0.5, "gamma": 0.0, "average": "valid", "loss_weight": 2.0}
        ours = focal_loss(logits, target, backend=self.backend, **options)
        theirs = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        torch.testing.assert_close(ours, theirs)

    def test_it_agrees_with_torchvision(self):
        ops = pytest.importorskip("torchvision.ops")
        logits, target = (t.to(self.device) for t in self.draw("hard", (40, 3), spread=1.0))
        theirs = ops.sigmoid_focal_loss(logits, target, reduction="sum") / target.sum()
        torch.testing.assert_close(focal_loss(logits, target, backend=self.backend), theirs)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
    @pytest.mark.parametrize("dense", [False, True])
    def test_huge_logits(self, gamma, dense):
        sizes = torch.tensor([0.0, 3.0, 8.0, 12.0, 16.0, 20.0, 40.0, 80.0, 120.0, 1e4])
        logits = torch.cat([sizes, -sizes]).repeat(2)[:, None]
        target = torch.arange(40) // 20
        target = 1.0 - target[:, None].float() if dense else target
        self.check(logits, target, gamma=gamma, reduction="none")

    @pytest.mark.parametrize("gamma", [1.0, 2.0])
    def test_a_hard_entry_that_is_nearly_lost(self, gamma):
        """Its slope holds `p_t log p_t`, where `p_t` of `1 - (1 - p_t)` would keep few digits."""
        logits = torch.arange(8.0, 18.0, 0.25, device=self.device)
        target = torch.zeros(40)
        options = {"gamma": gamma, "alpha": 0.0}
        loss, slope = self.call(logits, target, reduction="none", **options)
        truth = self.paper.focal(logits, target, **options)
        # A division to 2 ulps, which gamma multiplies, and as many products; rounded 1 - p_t, 14.
        self.paper.assert_close(slope, truth.slopes * 3.7, ulps=3 + 2 * gamma)
        self.paper.assert_close(loss, truth.entries, ulps=2 + 2 * gamma)

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize(("kind", "gamma"), [("index", 2.0), ("hard", 2.0), ("hard", 0.0)])
    def test_an_entry_that_is_not_finite_spoils_no_other(self, poison, kind, gamma):
        logits, target = self.draw("hard", (40, 3))
        target[7] = torch.tensor([1.0, 0.0, 0.0])
        target = target.argmax(dim=1) if kind == "index" else target
        for column in range(2):  # the class of the row, and another
            x = logits.clone()
            x[7, column] = poison
            loss, slope = self.call(x.to(self.device), target, gamma=gamma, reduction="none")
            assert loss.isnan().nonzero().tolist() == [[7, column]]
            assert slope.isnan().nonzero().tolist() == [[7, column]]

    def test_float16_gradients_do_not_underflow_under_a_loss_scale(self):
        # The slope of an easy negative is some 3e-7, divided by 4000 entries: 0 in float16, whose
        # smallest number is 6e-8; times the loss scale it is 4e-6.
        logits = torch.full((1000, 4), -8.0, dtype=torch.float16, device=self.device)
        logits.requires_grad_()
        target = torch.full((1000,), 4, device=self.device)
        options = {"gamma": 1.0, "average": "valid", "backend": self.backend}
        (focal_loss(logits, target, **options) * 65536.0).backward()
        q = 1 / (1 + np.exp(8.0))
        expected = 65536.0 / 4000 * 0.75 * q * ((1 - q) * np.logaddexp(0, -8.0) + q)
        # Half a step of the smallest numbers, 2^-24 apart.
        np.testing.assert_allclose(
            logits.grad.float().cpu(), expected, rtol=1e-3, atol=2.0**-25 * 1.01
        )
        assert logits.grad.all()
