"""Focal loss, against its formula in float64."""

import numpy as np
import pytest
import torch

from ghm_triton import (
    focal_loss,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


class TestFocal:
    @staticmethod
    def truth(paper, logits, target, alpha, gamma):
        x, t = paper.as_numpy(logits), paper.as_numpy(target)
        p = paper.sigmoid(x)
        positive = -alpha * (1 - p) ** gamma * -np.logaddexp(0, -x)
        negative = -(1 - alpha) * p**gamma * -np.logaddexp(0, x)
        return t * positive + (1 - t) * negative

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 0.5)])
    def test_it_is_the_papers(self, paper, device, generator, dtype, alpha, gamma):
        index = torch.randint(0, 6, (60,), generator=generator)
        dense = torch.nn.functional.one_hot(index, 6)[:, :5].float()
        logits = (torch.randn(60, 5, generator=generator) * 4).to(dtype)
        truth = self.truth(paper, logits, dense, alpha, gamma)
        for target in (index, dense):
            given = logits.to(device), target.to(device)
            loss = focal_loss(*given, alpha=alpha, gamma=gamma, reduction="none")
            paper.assert_close(loss, truth)
            loss = focal_loss(*given, alpha=alpha, gamma=gamma)
            paper.assert_close(loss, truth.sum() / paper.as_numpy(dense).sum())

    def test_its_gradient_is_that_of_the_papers_appendix(self, paper, generator):
        logits = torch.randn(40, generator=generator).requires_grad_()
        target = (torch.rand(40, generator=generator) < 0.5).float()
        (focal_loss(logits, target, reduction="sum") * OUTER).backward()
        p = paper.sigmoid(paper.as_numpy(logits))
        positive = -0.25 * (1 - p) ** 2 * (1 - p - 2 * p * np.log(p))
        negative = -0.75 * p**2 * (2 * (1 - p) * np.log(1 - p) - p)
        expected = np.where(paper.as_numpy(target) > 0, positive, negative) * OUTER
        # Two terms of opposite sign are added, each to an ulp of numbers below 1.
        paper.assert_close(logits.grad, expected, absolute=8 * paper.EPS32)

    def test_it_agrees_with_torchvision(self, generator):
        ops = pytest.importorskip("torchvision.ops")
        logits = torch.randn(40, 3, generator=generator)
        target = (torch.rand(40, 3, generator=generator) < 0.1).float()
        theirs = ops.sigmoid_focal_loss(logits, target, reduction="sum") / target.sum()
        torch.testing.assert_close(focal_loss(logits, target), theirs)

    @pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
    def test_huge_logits_have_a_gradient(self, gamma):
        logits = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
        focal_loss(logits, torch.tensor([1.0, 0.0, 0.0, 1.0]), gamma=gamma).backward()
        assert logits.grad.isfinite().all()

    def test_ignored_and_invalid(self):
        logits = torch.tensor([[1.0, -1.0], [torch.nan, 2.0]], requires_grad=True)
        loss = focal_loss(logits, torch.tensor([0, -1]))
        loss.backward()
        assert loss.isfinite()
        assert logits.grad[1].tolist() == [0.0, 0.0]
        with pytest.raises(ValueError, match="class index 3"):
            focal_loss(logits, torch.tensor([0, 3]))
        assert focal_loss(logits[:1], torch.tensor([3]), validate=False).isnan()
        assert focal_loss(logits[:1], torch.full((1, 2), 2.0), validate=False).isnan()
        assert focal_loss(logits, torch.tensor([-1, -1])) == 0.0

    def test_average_and_weight(self, paper, generator):
        logits = torch.randn(40, 3, generator=generator)
        target = (torch.rand(40, 3, generator=generator) < 0.1).float()
        weight = torch.randint(0, 3, (40, 1), generator=generator).float()
        truth = self.truth(paper, logits, target, 0.25, 2.0) * paper.as_numpy(weight)
        valid = 3 * int((weight > 0).sum())
        loss = focal_loss(logits, target, weight, weighted=True, average="valid")
        paper.assert_close(loss, truth.sum() / valid)

    def test_bad_options(self):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
            focal_loss(torch.zeros(1), torch.zeros(1), alpha=2)
        with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
            focal_loss(torch.zeros(1), torch.zeros(1), gamma=-1)
