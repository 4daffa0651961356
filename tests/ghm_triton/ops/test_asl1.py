"""What only the smooth-L1 kernels can get wrong; arithmetic is tested beside `reference`."""

import pytest
import torch

from ghm_triton import ghm_r_loss

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


@pytest.mark.parametrize("shape", [(3000, 4), (9000,), (3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_poisoned_memory_and_programs_that_walk(
    paper, device, poisoned, two_programs, shape, reduction
):
    generator = torch.Generator().manual_seed(10)
    target = torch.randn(shape, generator=generator)
    pred = paper.draw_pred(target, torch.float32, 10, 0.02, generator)
    results = []
    for backend, where in (("torch", torch.device("cpu")), ("triton", device)):
        x = pred.to(where).detach().requires_grad_()
        loss = ghm_r_loss(x, target.to(where), reduction=reduction, backend=backend, strength=1.0)
        (loss * 3.3).sum().backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    # Both are float32; the entries' own accuracy is tested against float64.
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_has_the_layout_of_the_predictions(device):
    pred = torch.randn(4, 40, device=device).t().requires_grad_()
    ghm_r_loss(pred, torch.zeros(40, 4, device=device), backend="triton").backward()
    assert pred.grad.stride() == pred.stride()


def test_an_entry_is_weighed_by_the_region_it_was_counted_in(device):
    """Also on the edges, where rounding decides: both kernels must round alike."""
    from ghm_triton.losses.inputs import regression_inputs
    from ghm_triton.ops import backend as ops

    bins, mu = 10, 0.02
    g = torch.arange(1, bins, dtype=torch.float64) / bins
    edges = (mu * g / (1 - g * g).sqrt()).float()
    near = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)]).to(device)
    inputs = regression_inputs(near, torch.zeros_like(near), None, None)
    regions = ops.count_asl1(inputs, bins, mu).regions
    one = torch.ones((), device=device)

    def weigh(table):
        table = table.to(device)
        return ops.weighted_asl1(inputs, table, one, mu=mu, weighted=False, reduce=False)

    weighed = weigh(torch.arange(1.0, bins + 1)) / weigh(torch.ones(bins))
    found = torch.bincount(weighed.round().long().flatten() - 1, minlength=bins)
    assert found.tolist() == regions.tolist()
