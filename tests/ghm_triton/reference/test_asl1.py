"""Weighted authentic smooth L1 with a given table and scale, by either implementation."""

import numpy as np
import pytest
import torch

from ghm_triton.losses.inputs import regression_inputs


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("mu", [0.02, 1.0])
def test_a_table_of_its_own(paper, device, kernels, reduce, weighted, mu):
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(90, 4, generator=generator)
    pred = paper.draw_pred(target, torch.float32, 5, mu, generator, spread=2 * mu)
    weight = torch.randint(0, 3, (90, 1), generator=generator).float()
    table = torch.tensor([3.0, 0.0, 1e4, 1e-4, 0.5])
    outer = torch.randn(90, 4, generator=generator) if not reduce else torch.tensor(-2.3)

    x = pred.to(device).requires_grad_()
    inputs = regression_inputs(x, target.to(device), weight.to(device), None, mu)
    loss = kernels.weighted_asl1(
        inputs,
        table.to(device),
        torch.tensor(0.125, device=device),
        weighted=weighted,
        reduce=reduce,
    )
    loss.backward(outer.to(device))

    entries, slopes = paper.asl1_parts(paper.as_numpy(pred) - paper.as_numpy(target), mu)
    factor = paper.as_numpy(table)[np.minimum((np.abs(slopes) * 5).astype(int), 4)]
    factor = np.where(paper.as_numpy(weight) > 0, factor, 0) * 0.125
    factor = factor * (paper.as_numpy(weight) if weighted else 1.0)
    expected = factor * entries
    paper.assert_close(loss, expected.sum() if reduce else expected)
    paper.assert_close(x.grad, paper.as_numpy(outer) * factor * slopes)


def test_tiny_differences_keep_their_digits(paper, device, kernels):
    """`sqrt(d^2 + mu^2) - mu` as written is 0 at `d = 1e-6`; the loss there is 2.5e-11."""
    d = torch.tensor([[1e-6, -1e-4, 1e-3, 0.0]])
    inputs = regression_inputs(d.to(device), torch.zeros(1, 4, device=device), None, None)
    one = torch.ones(1, device=device)
    loss = kernels.weighted_asl1(inputs, one, one[0], weighted=False, reduce=False)
    paper.assert_close(loss, paper.asl1_parts(paper.as_numpy(d), 0.02)[0])
