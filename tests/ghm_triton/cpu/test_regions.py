"""Counting and looking up unit regions, one by one and in pairs."""

import pytest
import torch

from ghm_triton.cpu.regions import MOST_PAIRED, RegionCounter, RegionTable
from ghm_triton.cpu.scratch import here
from ghm_triton.reference.binning import unit_region

BINS = [1, 2, 3, 30, 126, 127, 200, 1024]


def draw(entries, bins, generator):
    """Norms at random, and on both sides of every edge."""
    edges = torch.arange(bins + 1) / bins
    near = torch.cat(
        [edges.nextafter(torch.tensor(0.0)), edges, edges.nextafter(torch.tensor(1.0))]
    )
    norm = torch.cat([near, torch.rand(entries, generator=generator)])
    return norm[torch.randperm(len(norm), generator=generator)][-entries:].clone()


def test_bytes_hold_the_paired():
    assert MOST_PAIRED in (0, torch.iinfo(torch.int8).max - 1)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("keep", [None, (13, 1), (13, 7)])
def test_counts(generator, bins, keep):
    counter = RegionCounter(bins)
    expected = torch.zeros(bins, dtype=torch.int64)
    for entries in (1300 + 91, 91, 13):  # the last block is smaller; all are odd
        shape = (13, entries // 13)
        norm = draw(entries, bins, generator)
        norm[norm < 0.3] = 0.0  # many in one region, as norms are
        mask = None
        if keep is not None:
            columns = 1 if keep[1] == 1 else shape[1]
            mask = torch.randint(0, 2, (13, columns), generator=generator).float()
        taken = torch.ones(shape) if mask is None else mask.expand(shape)
        expected += unit_region(norm, bins)[taken.flatten() > 0].bincount(minlength=bins)
        counter.add(norm, mask, shape, here().views(entries))
    assert torch.equal(counter.regions(), expected)
    more = torch.arange(bins)
    counter.add_counts(more)
    assert torch.equal(counter.regions(), expected + more)
    assert counter.regions().dtype == torch.int64


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("entries", [1, 2, 90, 91])
@pytest.mark.parametrize("in_place", [False, True])
def test_weights(generator, bins, entries, in_place):
    table = torch.randn(bins, generator=generator)
    regions = RegionTable(table.numpy())
    for count in (entries, entries + 6, entries):
        views, norm = here().views(count), draw(count, bins, generator)
        beyond = here().views(count + 2).weight[-1:].fill_(7.0)
        source = views.weight if in_place else views.slope
        found = regions.look_up(source.copy_(norm), views)
        assert found is views.weight
        assert torch.equal(found, table[unit_region(norm, bins)])
        assert in_place or torch.equal(source, norm)
        assert beyond == 7.0


@pytest.mark.parametrize("bins", [30, 200])
def test_any_bits_of_a_weight_come_through(bins):
    table = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45]).repeat(bins)[:bins]
    views = here().views(bins)
    views.slope.copy_((torch.arange(bins) + 0.5) / bins)
    found = RegionTable(table.numpy()).look_up(views.slope, views)
    assert torch.equal(found.view(torch.int32), table.view(torch.int32))
