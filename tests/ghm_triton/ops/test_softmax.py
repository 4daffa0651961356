"""What only the softmax kernels can get wrong; arithmetic is tested beside `reference`."""

import pytest
import torch

from ghm_triton import ghm_softmax_loss, reference
from ghm_triton.reference.interface import SoftmaxInputs

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]

BINS = 1024  # the most: the more edges, the more rows lie near one


@pytest.mark.parametrize(
    ("shape", "expected", "warps"),
    [
        ((0, 5), (0, 128, 8, 1), 1),
        ((3, 1), (1, 512, 2, 1), 1),
        ((513, 2), (2, 512, 2, 2), 1),
        ((17, 80), (3, 8, 128, 3), 1),
        ((1 << 20, 81), (131072, 8, 128, 1024), 1),
        ((3, 1024), (3, 1, 1024, 3), 1),
        ((3, 1025), (2, 2, 2048, 2), 4),
        ((5000, 4096), (5000, 1, 4096, 1024), 4),
    ],
)
def test_a_row_lies_in_one_tile(shape, expected, warps):
    from ghm_triton.ops.softmax import row_tiling

    assert row_tiling(torch.empty(shape, device="meta")) == (*expected, warps)


def on_edges(rows, classes, generator):
    """Rows whose `1 - p_y` is an edge of 1024 regions, to within a rounding either way."""
    logits = torch.randn(rows, classes, generator=generator) * 2
    index = torch.randint(0, classes, (rows,), generator=generator)
    edge = torch.randint(1, BINS, (rows,), generator=generator) / BINS
    own = torch.nn.functional.one_hot(index, classes).bool()
    others = logits.double().masked_fill(own, -torch.inf).logsumexp(dim=1)
    chosen = others + torch.log((1 - edge.double()) / edge)
    return torch.where(own, chosen[:, None].float(), logits), index


def regions_of(device, logits, index):
    """What was counted, and the region that each row was weighed by."""
    from ghm_triton.ops import backend as ops

    one = torch.ones((), device=device)
    inputs = SoftmaxInputs(logits.to(device), index.to(device), None, index.shape)
    # The weight of a region is its number: the quotient tells which it was.
    numbers = torch.arange(1.0, BINS + 1, device=device)
    options = {"weighted": False, "reduce": False}
    numbered = ops.weighted_softmax(inputs, numbers, one, **options)
    plain = reference.weighted_softmax(inputs, torch.ones_like(numbers), one, **options)
    return ops.count_softmax(inputs, BINS).regions, (numbered / plain).round().long() - 1


@pytest.mark.parametrize("classes", [2, 5, 91])
def test_a_row_is_weighed_by_the_region_that_it_was_counted_in(device, classes):
    logits, index = on_edges(40, classes, torch.Generator().manual_seed(2))
    counts, region = regions_of(device, logits, index)
    assert torch.equal(torch.bincount(region, minlength=BINS), counts)


def test_the_region_does_not_depend_on_the_order_in_which_lanes_add(device):
    """Lanes may be laid out differently in two kernels, as if the columns changed places."""
    generator = torch.Generator().manual_seed(5)
    logits, index = on_edges(40, 91, generator)
    counts, region = regions_of(device, logits, index)
    for _ in range(2):
        order = torch.randperm(91, generator=generator)
        place = torch.argsort(order)[index]
        counts_too, region_too = regions_of(device, logits[:, order], place)
        assert torch.equal(region_too, region)
        assert torch.equal(counts_too, counts)


def test_no_gradient_is_formed_that_nobody_asked_for(device, monkeypatch):
    logits = torch.randn(30, 5, device=device)
    index = torch.zeros(30, dtype=torch.int64, device=device)
    made = []
    make = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(a) or make(*a, **k))
    ghm_softmax_loss(logits, index, backend="triton")
    with torch.no_grad():
        ghm_softmax_loss(logits.requires_grad_(), index, backend="triton")
    assert made == []
    ghm_softmax_loss(logits, index, backend="triton")
    assert len(made) == 1
