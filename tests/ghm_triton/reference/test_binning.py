"""Counting, by either implementation: `reference` is the specification, `ops` its twin."""

import pytest
import torch

from ghm_triton.losses.inputs import classification_inputs, regression_inputs
from ghm_triton.reference.losses import unit_region


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(1)


def counts_of(kernels, device, logits, target, weight=None, bins=30):
    given = [None if t is None else t.to(device) for t in (logits, target, weight)]
    return kernels.count_bce(classification_inputs(*given, validate=False), bins)


@pytest.mark.parametrize("bins", [1, 2, 30, 31, 32, 1024])
@pytest.mark.parametrize("kind", ["index", "soft"])
def test_counts_and_positives(paper, device, generator, kernels, bins, kind):
    shape = (150, 3)
    target = torch.rand(shape, generator=generator)
    if kind == "index":
        target = torch.randint(-1, 4, shape[:1], generator=generator)
    logits = paper.draw_logits(shape, target, torch.float32, bins, generator)
    weight = torch.randint(0, 2, shape, generator=generator).float()
    truth = paper.ghm_c(logits, target, weight, bins=bins)
    counts = counts_of(kernels, device, logits, target, weight, bins)
    assert counts.regions.tolist() == truth.counts
    assert counts.invalid == 0
    # Positives are summed in float32 a lane, in float64 across lanes.
    assert float(counts.positives.sum()) == pytest.approx(truth.positives, rel=1e-6)
    assert (counts.regions.dtype, counts.invalid.dtype) == (torch.int64, torch.int64)
    assert counts.positives.dtype == torch.float64


def test_positives_of_hard_targets_are_exact(device, generator, kernels):
    index = torch.randint(-1, 4, (500,), generator=generator)
    logits = torch.randn(500, 3, generator=generator)
    expected = int(((index >= 0) & (index < 3)).sum())
    assert counts_of(kernels, device, logits, index).positives.sum() == expected
    # A positive whose own entry is ignored is none.
    weight = torch.ones(500, 3)
    weight[:, 0] = 0
    expected = int(((index >= 1) & (index < 3)).sum())
    assert counts_of(kernels, device, logits, index, weight).positives.sum() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["index", "dense"])
def test_a_logit_that_is_not_finite_is_noticed(device, kernels, value, kind):
    logits = torch.zeros(300, 20)
    logits[299, 17] = value
    background = torch.full((300,), 20) if kind == "index" else torch.zeros(300, 20)
    assert counts_of(kernels, device, logits, background).invalid > 0
    for hidden in (torch.ones(300, 20), torch.ones(300, 1)):
        hidden[299] = 0
        counts = counts_of(kernels, device, logits, background, hidden)
        assert counts.invalid == 0
        assert counts.regions.sum() == 299 * 20
    if kind == "index":
        background[299] = -1
        assert counts_of(kernels, device, logits, background).invalid == 0


def test_a_target_out_of_range_is_noticed(device, kernels):
    logits = torch.zeros(300, 20)
    for label, expected in ((20, 0), (21, 1), (2**40, 1), (2**32 + 3, 1), (-1, 0), (-(2**40), 0)):
        index = torch.zeros(300, dtype=torch.int64)
        index[299] = label
        assert (counts_of(kernels, device, logits, index).invalid > 0) == expected
        weight = torch.ones(300, 20)
        weight[299] = 0
        assert counts_of(kernels, device, logits, index, weight).invalid == 0
    for value in (1.5, -0.5, torch.nan):
        dense = torch.zeros(300, 20)
        dense[299, 17] = value
        assert counts_of(kernels, device, logits, dense).invalid > 0
        weight = torch.ones(300, 20)
        weight[299, 17] = 0
        assert counts_of(kernels, device, logits, dense, weight).invalid == 0


@pytest.mark.parametrize("bins", [1, 10, 64])
def test_regression_counts(paper, device, generator, kernels, bins):
    target = torch.randn(120, 4, generator=generator)
    pred = paper.draw_pred(target, torch.float32, bins, 0.02, generator)
    weight = torch.randint(0, 2, (120, 1), generator=generator).float()
    truth = paper.ghm_r(pred, target, weight, bins=bins)
    given = regression_inputs(pred.to(device), target.to(device), weight.to(device), None)
    counts = kernels.count_asl1(given, bins)
    assert counts.regions.tolist() == truth.counts
    assert counts.positives.sum() == truth.positives
    assert counts.invalid == 0


def test_a_difference_that_is_not_finite_is_noticed(device, kernels):
    pred = torch.tensor([[torch.nan, torch.inf], [-torch.inf, 1.0]], device=device)
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0]], device=device)
    counts = kernels.count_asl1(regression_inputs(pred, pred * 0 + 1, weight, False), 4)
    # pred * 0 is NaN where pred is not finite: NaN - NaN, inf - NaN, ignored, 1 - 1.
    assert counts.invalid > 0


def test_unit_region_at_edges_and_ends():
    norm = torch.tensor([0.0, 0.25, 0.2499, 0.5, 0.999, 1.0, torch.nan])
    assert unit_region(norm, 4).tolist() == [0, 1, 0, 2, 3, 3, 0]
