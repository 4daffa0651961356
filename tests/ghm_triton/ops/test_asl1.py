"""What only the smooth-L1 kernels can get wrong; arithmetic is tested beside `reference`."""

import pytest
import torch

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


def test_an_entry_is_weighed_by_the_region_it_was_counted_in(device):
    """Also on the edges, where rounding decides: both kernels must round alike."""
    from ghm_triton.losses.inputs import regression_inputs
    from ghm_triton.ops import backend as ops

    bins, mu = 10, 0.02
    g = torch.arange(1, bins, dtype=torch.float64) / bins
    edges = (mu * g / (1 - g * g).sqrt()).float()
    near = torch.cat([edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1)]).to(device)
    inputs = regression_inputs(near, torch.zeros_like(near), None, None, mu)
    regions = ops.count_asl1(inputs, bins).regions
    one = torch.ones((), device=device)

    def weigh(table):
        table = table.to(device)
        return ops.weighted_asl1(inputs, table, one, weighted=False, reduce=False)

    weighed = weigh(torch.arange(1.0, bins + 1)) / weigh(torch.ones(bins))
    found = torch.bincount(weighed.round().long().flatten() - 1, minlength=bins)
    assert found.tolist() == regions.tolist()
