"""Counting and looking up unit regions, one by one and in pairs."""

import pytest
import torch

from ghm_triton.cpu.blocks import (
    MAX_PAIRED,
    SLOPE,
    WEIGHT,
    RegionCounter,
    RegionTable,
    buffer,
    reserve,
)
from ghm_triton.reference.losses import unit_region

BINS = [1, 2, 3, 30, 126, 127, 200, 1024]


@pytest.fixture(autouse=True)
def _memory():
    reserve()


def draw(entries, bins, generator):
    """Norms at random, and on both sides of every edge."""
    edges = torch.arange(bins + 1) / bins
    near = [edges.nextafter(torch.tensor(0.0)), edges, edges.nextafter(torch.tensor(1.0))]
    norm = torch.cat([*near, torch.rand(entries, generator=generator)])
    return norm[torch.randperm(len(norm), generator=generator)][-entries:].clone()


def test_bytes_hold_the_paired():
    assert MAX_PAIRED in (0, torch.iinfo(torch.int8).max - 1)


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("keep", [None, (13, 1), (13, 7)])
def test_counts(generator, bins, keep):
    counter = RegionCounter(bins)
    expected = torch.zeros(bins, dtype=torch.int64)
    for entries in (1300 + 91, 91, 13):  # the last block is smaller; all are odd
        norm = draw(entries, bins, generator)
        norm[norm < 0.3] = 0.0  # many in one region, as norms are
        mask = None
        if keep is not None:
            columns = 1 if keep[1] == 1 else entries // 13
            mask = torch.randint(0, 2, (13, columns), generator=generator).float()
        taken = torch.ones(13, entries // 13) if mask is None else mask.expand(13, entries // 13)
        expected += unit_region(norm, bins)[taken.flatten() > 0].bincount(minlength=bins)
        counter.add(norm, mask)
    assert torch.equal(counter.regions(), expected)
    assert counter.regions().dtype == torch.int64


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("entries", [1, 2, 3, 90, 91])
@pytest.mark.parametrize("in_place", [False, True])
def test_weights(generator, bins, entries, in_place):
    table = torch.randn(bins, generator=generator)
    regions = RegionTable(table.numpy())
    for count in (entries, entries + 6, entries):
        norm = draw(count, bins, generator)
        beyond = buffer(WEIGHT, count + 2)[-1:].fill_(7.0)
        source = buffer(WEIGHT if in_place else SLOPE, count)
        weights = regions.look_up(source.copy_(norm))
        assert weights.data_ptr() == buffer(WEIGHT, 1).data_ptr()
        assert torch.equal(weights, table[unit_region(norm, bins)])
        assert in_place or torch.equal(source, norm)
        assert beyond == 7.0


@pytest.mark.parametrize("bins", [30, 200])
def test_any_bits_of_a_weight_come_through(bins):
    table = torch.tensor([torch.nan, torch.inf, -0.0, 1e-45]).repeat(bins)[:bins]
    weights = RegionTable(table.numpy()).look_up((torch.arange(bins) + 0.5) / bins)
    assert torch.equal(weights.view(torch.int32), table.view(torch.int32))
