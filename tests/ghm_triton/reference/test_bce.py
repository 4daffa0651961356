"""Weighted cross entropy with a given table and scale, by either implementation."""

import numpy as np
import pytest
import torch

from ghm_triton.losses.inputs import classification_inputs

OUTER = -2.3


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_a_table_of_its_own(paper, device, kernels, reduce, weighted, kind):
    generator = torch.Generator().manual_seed(2)
    target = torch.rand(90, 3, generator=generator)
    if kind == "index":
        target = torch.randint(-1, 4, (90,), generator=generator)
    logits = paper.draw_logits((90, 3), target, torch.float32, 8, generator)
    weight = torch.randint(0, 3, (90, 1), generator=generator).float()
    table = torch.tensor([3.0, 0.0, 1e4, 1e-4, 0.5, 7.0, 1.0, 2.0])
    scale = torch.tensor(0.125)
    outer = torch.randn(90, 3, generator=generator) if not reduce else torch.tensor(OUTER)

    x = logits.to(device).requires_grad_()
    inputs = classification_inputs(x, target.to(device), weight.to(device), None)
    loss = kernels.weighted_bce(
        inputs, table.to(device), scale.to(device), weighted=weighted, reduce=reduce
    )
    loss.backward(outer.to(device))

    valid = np.broadcast_to(paper.as_numpy(weight) > 0, (90, 3))
    dense = paper.as_numpy(target)
    if kind == "index":
        valid = valid & (dense >= 0)[:, None]
        dense = paper.one_hot(dense, 3)
    entries, slopes = paper.bce_parts(paper.as_numpy(logits), dense)
    regions = np.minimum((np.abs(slopes) * 8).astype(int), 7)
    factor = np.where(valid, paper.as_numpy(table)[regions], 0)
    factor = factor * (paper.as_numpy(weight) if weighted else 1.0) * 0.125
    lost = factor * paper.cancellation(logits, target)
    expected = factor * entries
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
