"""Weighted losses with a given table and scale, by either implementation."""

import numpy as np
import pytest
import torch

from ghm_triton.losses.inputs import classification_inputs, regression_inputs


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("kind", "mu"), [("index", 0), ("soft", 0), ("deltas", 0.02), ("deltas", 1.0)]
)
def test_any_table(paper, device, kernels, reduce, weighted, kind, mu):
    generator = torch.Generator().manual_seed(2)
    shape, table = (90, 4), torch.tensor([3.0, 0.0, 1e4, 1e-4, 0.5, 7.0, 1.0, 2.0])
    weight = torch.randint(0, 3, (90, 1), generator=generator).float()
    factor = np.broadcast_to(paper.as_numpy(weight), shape)
    valid, lost = factor > 0, np.zeros(1)
    if kind == "deltas":
        target = torch.randn(shape, generator=generator)
        values = paper.draw_pred(target, torch.float32, 8, mu, generator, spread=2 * mu)
        difference = paper.as_numpy(values) - paper.as_numpy(target)
        entries, slopes = paper.asl1_parts(difference, mu)
    else:
        target = torch.rand(shape, generator=generator)
        if kind == "index":
            target = torch.randint(-1, 5, (90,), generator=generator)
        values = paper.draw_logits(shape, target, torch.float32, 8, generator)
        dense = paper.as_numpy(target)
        if kind == "index":
            valid = valid & (dense >= 0)[:, None]
            dense = paper.one_hot(dense, 4)
        entries, slopes = paper.bce_parts(paper.as_numpy(values), dense)
        lost = paper.cancellation(values, target)
    regions = np.minimum((np.abs(slopes) * 8).astype(int), 7)
    factor = np.where(valid, paper.as_numpy(table)[regions], 0) * (factor if weighted else 1.0)
    factor = factor * 0.125
    outer = torch.tensor(-2.3) if reduce else torch.randn(shape, generator=generator)

    x = values.to(device).requires_grad_()
    given = (x, target.to(device), weight.to(device), None)
    if kind == "deltas":
        inputs, loss = regression_inputs(*given, mu), kernels.weighted_asl1
    else:
        inputs, loss = classification_inputs(*given), kernels.weighted_bce
    scale = torch.tensor(0.125, device=device)
    loss = loss(inputs, table.to(device), scale, weighted=weighted, reduce=reduce)
    loss.backward(outer.to(device).expand(loss.shape))

    expected, lost = factor * entries, factor * lost
    paper.assert_close(loss, expected.sum() if reduce else expected, lost.sum() if reduce else lost)
    outer = paper.as_numpy(outer)
    paper.assert_close(x.grad, outer * factor * slopes, np.abs(outer) * lost)


def test_small_and_large_losses_keep_their_digits(paper, device, kernels):
    """Cross entropy of 1e-9 or 1e-30 is not rounded to zero, and of 1e4 not to infinity."""
    logits = torch.tensor([-20.0, 20.0, -69.0, 69.0, -80.5, 1e4, -1e4, 30.0], device=device)
    index = torch.tensor([1, 0, 1, 0, 1, 1, 0, 1], device=device)
    inputs = classification_inputs(logits[:, None], index, None, None)
    one = torch.ones(1, device=device)
    loss = kernels.weighted_bce(inputs, one, one[0], weighted=False, reduce=False)
    u = paper.as_numpy(logits) * np.where(paper.as_numpy(index) == 0, -1, 1)
    # exp(-80) on a GPU is 2^(-80 log2 e), whose exponent is rounded at 2^-18: 80 ulps.
    paper.assert_close(loss, np.logaddexp(0, u)[:, None], ulps=128)


def test_a_nan_table_or_scale_reaches_every_gradient(device, kernels):
    x = torch.zeros(5, 2, device=device, requires_grad=True)
    inputs = classification_inputs(x, torch.zeros(5, 2, device=device), None, None)
    table = torch.full((4,), torch.nan, device=device)
    scale = torch.tensor(torch.nan, device=device)
    loss = kernels.weighted_bce(inputs, table, scale, weighted=False, reduce=True)
    loss.backward()
    assert loss.isnan()
    assert x.grad.isnan().all()


def test_tiny_differences_keep_their_digits(paper, device, kernels):
    """`sqrt(d^2 + mu^2) - mu` as written is 0 at `d = 1e-6`; the loss there is 2.5e-11."""
    d = torch.tensor([[1e-6, -1e-4, 1e-3, 0.0]])
    inputs = regression_inputs(d.to(device), torch.zeros(1, 4, device=device), None, None)
    one = torch.ones(1, device=device)
    loss = kernels.weighted_asl1(inputs, one, one[0], weighted=False, reduce=False)
    paper.assert_close(loss, paper.asl1_parts(paper.as_numpy(d), 0.02)[0])
