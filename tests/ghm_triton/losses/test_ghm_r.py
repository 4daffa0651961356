"""GHM-R as a function, by either backend, against float64."""

import pytest
import torch

from ghm_triton import (
    ghm_r_loss,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


def check_ghm_r(paper, device, pred, target, label_weight=None, reduction="mean", **options):
    """The loss and its gradient are those of the paper."""
    backend = options.pop("backend")
    options = {"strength": 1.0, **options}
    x = pred.detach().to(device).requires_grad_()
    given = None if label_weight is None else label_weight.to(device)
    loss = ghm_r_loss(x, target.to(device), given, reduction=reduction, backend=backend, **options)
    (loss * OUTER).sum().backward()

    truth = paper.ghm_r(pred, target, label_weight, **options)
    scale = truth.scale(reduction, "valid")
    entries = truth.entries if reduction == "none" else truth.entries.sum() * scale
    paper.assert_close(loss, entries)
    paper.assert_gradient_close(x.grad, truth.slopes * scale * OUTER)


class TestGHMR:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_dtype_and_reduction(self, paper, device, generator, backend, dtype, reduction):
        target = (torch.randn(90, 4, generator=generator) * 0.1).to(dtype)
        pred = paper.draw_pred(target, dtype, 10, 0.02, generator)
        options = {"reduction": reduction, "backend": backend}
        check_ghm_r(paper, device, pred, target, **options)

    @pytest.mark.parametrize(
        "options",
        [
            {"mu": 0.5},
            {"mu": 1e-4, "bins": 3},
            {"strength": 0.25},
            {"normalizer": "bins", "max_weight": 2.0},
            {"bins": 1},
            {"bins": 64},
        ],
        ids=str,
    )
    def test_options(self, paper, device, generator, backend, options):
        target = torch.zeros(90, 4)
        mu, bins = options.get("mu", 0.02), options.get("bins", 10)
        pred = paper.draw_pred(target, torch.float32, bins, mu, generator, spread=2 * mu)
        check_ghm_r(paper, device, pred, target, backend=backend, **options)

    @pytest.mark.parametrize("shape", [(60, 4), (60, 1), (4,)])
    @pytest.mark.parametrize("weighted", [False, True])
    def test_label_weight(self, paper, device, generator, backend, shape, weighted):
        target = torch.zeros(60, 4)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator)
        label_weight = torch.randint(0, 3, shape, generator=generator).float()
        options = {"weighted": weighted, "backend": backend}
        check_ghm_r(paper, device, pred, target, label_weight, **options)

    @pytest.mark.parametrize("shape", [(33,), (7, 3), (2, 5, 4)])
    def test_any_shape_and_strides(self, paper, device, generator, backend, shape):
        target = torch.randn(shape, generator=generator)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator)
        flipped = pred.to(device).transpose(0, -1).contiguous().transpose(0, -1)
        check_ghm_r(paper, device, flipped, target, backend=backend)

    def test_no_difference_and_huge_ones(self, paper, device, backend):
        # g of 0 opens the first region; the squares of 1e30 would overflow; g rounds to 1.
        pred = torch.tensor([0.0, 1e-20, 1e4, -1e4, 1e30, -1e37])
        check_ghm_r(paper, device, pred, torch.zeros(6), backend=backend, reduction="none")

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_what_is_not_finite(self, paper, device, generator, backend, poison):
        target = torch.zeros(30, 4)
        pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator)
        pred[3], target[4] = poison, poison
        weight = torch.ones(30, 1)
        weight[3:5] = 0
        check_ghm_r(paper, device, pred, target, weight, backend=backend)
        weight[3] = 1
        given = [tensor.to(device) for tensor in (pred, target, weight)]
        assert ghm_r_loss(*given, backend=backend).isnan()

    @pytest.mark.parametrize("shape", [(0, 4), (0,), (3, 0)])
    def test_nothing_in_nothing_out(self, device, backend, shape):
        pred = torch.zeros(shape, device=device, requires_grad=True)
        loss = ghm_r_loss(pred, torch.zeros_like(pred), backend=backend)
        loss.backward()
        assert float(loss.detach()) == 0.0
        assert pred.grad.shape == shape

    def test_no_gradient_reaches_the_target(self, device, generator, backend):
        pred = torch.randn(10, 4, generator=generator).to(device).requires_grad_()
        target = torch.randn(10, 4, generator=generator).to(device).requires_grad_()
        ghm_r_loss(pred, target, backend=backend).backward()
        assert target.grad is None
        assert pred.grad.abs().sum() > 0
