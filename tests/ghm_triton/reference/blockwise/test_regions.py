"""Counting and looking up unit regions, one by one and in pairs."""

import pytest
import torch

from ghm_triton.reference.binning import unit_region
from ghm_triton.reference.blockwise.regions import MOST_PAIRED, RegionCounter, RegionTable
from ghm_triton.reference.blockwise.scratch import Scratch

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
    counter, scratch = RegionCounter(bins), Scratch()
    expected = torch.zeros(bins, dtype=torch.int64)
    for entries in (91, 91, 13):  # the last block is smaller; all are odd
        shape = (13, entries // 13)
        norm = draw(entries, bins, generator)
        mask = None
        if keep is not None:
            mask = torch.randint(0, 2, (13, min(keep[1], shape[1])), generator=generator).float()
        taken = torch.ones(shape) if mask is None else mask.expand(shape)
        expected += unit_region(norm, bins)[taken.flatten() > 0].bincount(minlength=bins)
        counter.add(norm, mask, shape, scratch)
    assert torch.equal(counter.regions(), expected)
    more = torch.arange(bins)
    counter.add_counts(more)
    assert torch.equal(counter.regions(), expected + more)
    assert counter.regions().dtype == torch.int64


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("entries", [1, 2, 90, 91])
@pytest.mark.parametrize("in_place", [False, True])
def test_weights(generator, bins, entries, in_place):
    table, scratch = torch.randn(bins, generator=generator), Scratch()
    regions = RegionTable(table)
    for count in (entries, entries + 6, entries):
        source, out, after, _ = scratch.views(count)
        norm = draw(count, bins, generator)
        source.copy_(norm)
        after.fill_(7.0)
        found = regions.look_up(source, source if in_place else out, scratch)
        assert torch.equal(found, table[unit_region(norm, bins)])
        assert in_place or torch.equal(source, norm)
        assert (after == 7.0).all()


@pytest.mark.parametrize("bins", [30, 200])
def test_any_bits_of_a_weight_come_through(bins):
    table = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45]).repeat(bins)[:bins]
    norm, out, *_ = Scratch().views(bins)
    norm.copy_((torch.arange(bins) + 0.5) / bins)
    RegionTable(table).look_up(norm, out, Scratch())
    assert torch.equal(out.view(torch.int32), table.view(torch.int32))
