import warnings

import pytest
import torch

from ghm_triton import reference
from ghm_triton.diagnosis import DensityWarning, problems_of, regions_of, warn_of
from ghm_triton.losses import GHMCLoss, GHMRLoss, GHMSoftmaxLoss, ghm_c_loss
from ghm_triton.losses.density import GradientDensity
from ghm_triton.reference import RegionCounts


def counted(entries, *, updates=1, **options):
    """A density that counted these entries."""
    density = GradientDensity(len(entries), **options)
    density.smoothed.copy_(torch.tensor(entries))
    density.updates.fill_(updates)
    return density


def test_regions_are_those_that_the_loss_weighs_by():
    """Without a moving average the weights are the next call's, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 4, generator=generator)
    labels = torch.randint(0, 5, (500,), generator=generator)
    criterion = GHMCLoss(bins=10, momentum=0.0, strength=0.5, max_weight=1.3, reduction="none")
    entries = criterion(logits, labels)
    plain = ghm_c_loss(logits, labels, strength=0.0, reduction="none")
    found = regions_of(criterion.density)
    target = torch.nn.functional.one_hot(labels, 5)[:, :4]
    norms = (torch.sigmoid(logits.double()) - target).abs()
    region = (norms * 10).long().clamp(max=9)
    # Float32 weights.
    torch.testing.assert_close(entries, (found.weights[region] * plain).float(), rtol=1e-5, atol=0)
    assert torch.equal(found.entries, torch.bincount(region.flatten(), minlength=10).double())
    share = torch.zeros(10, dtype=torch.float64)
    share.index_add_(0, region.flatten(), (found.weights[region] * norms).flatten())
    # Every norm counts as its region's centre.
    torch.testing.assert_close(found.shares, share / share.sum(), rtol=0.2, atol=0.01)
    assert float(found.weights.max()) == 1.3
    assert float(found.shares.sum()) == pytest.approx(1.0, rel=1e-12)


def test_the_average_is_debiased_as_it_is_when_it_weighs():
    density = counted([40.0, 10.0, 0.0], updates=2, momentum=0.5)
    found = regions_of(density)
    assert found.entries.tolist() == pytest.approx([40 / 0.75, 10 / 0.75, 0.0])
    assert found.betas.tolist() == pytest.approx([50 / 80, 50 / 20, 0.0])
    assert regions_of(counted([40.0, 10.0, 0.0], normalizer="bins")).betas.tolist() == (
        pytest.approx([50 / 120, 50 / 30, 0.0])
    )
    assert regions_of(counted([40.0, 10.0], updates=2, momentum=0.5, ema="mmdet")).entries[0] == 40


def fed(density, batches):
    """The weights of the last batch, given the entries by region of each."""
    for entries in batches:
        counts = RegionCounts(entries.long(), torch.zeros(1).double(), torch.tensor(0))
        weights, _ = density.weigh(counts, reference)
    return weights.double()


@pytest.mark.parametrize("method", ["unit_region", "streaming"])
@pytest.mark.parametrize("normalizer", ["valid_bins", "bins"])
def test_regions_that_were_not_hit_for_long_weigh_on_nobody(method, normalizer):
    """Every region is hit once, and then a third of them only: as is weighed, so is reported."""
    density = GradientDensity(30, 0.75, 1.0, normalizer, density=method)
    everywhere = torch.full((density.regions,), 100.0)
    hit = torch.arange(density.regions) < density.regions // 3
    really = fed(density, [everywhere, *60 * [everywhere * hit]])
    found = regions_of(density)
    # Float32 weights.
    torch.testing.assert_close(found.weights[hit], really[hit], rtol=1e-5, atol=0)
    assert float(found.entries[-1]) > 0  # not gone yet
    assert float(found.weights[-1]) == 0.0
    assert float(found.shares[hit].sum()) == pytest.approx(1.0, rel=1e-6)


def test_a_weight_that_explodes_is_measured_by_the_regions_in_use():
    density = GradientDensity(30, 0.75, 1.0)
    sparse = torch.zeros(30)
    sparse[0], sparse[29] = 400_000.0, 100.0
    really = fed(density, [torch.full((30,), 10.0), *40 * [sparse]])
    [problem] = [x for x in problems_of(density) if "explode" in x]
    assert f"weighs {float(really.max()):.3g}" in problem


def test_entries_thinner_than_what_is_forgotten_are_looked_at_all_the_same():
    found = regions_of(counted(1000 * [0.001], strength=1.0))
    assert found.weights.tolist() == pytest.approx(1000 * [1.0])


def test_thin_bins_are_named_with_the_remedy():
    thin = counted([1e6, 3.0, 2.0, 0.0, 3.0], strength=1.0, momentum=0.5)
    thin.smoothed *= 0.5
    [problem] = [x for x in problems_of(thin) if "thin" in x]
    assert "3 of 4 regions" in problem
    assert "fewer bins than 5" in problem
    assert "less strength" in problem


def test_less_strength_bears_thinner_bins():
    entries = [1e6, 3.0, 2.0, 3.0]
    assert any("thin" in x for x in problems_of(counted(entries, strength=1.0)))
    assert problems_of(counted(entries, strength=0.25)) == []
    # As many thin ones as others is no majority; what was forgotten is not in use.
    assert not any("thin" in x for x in problems_of(counted([1e6, 1e6, 2.0, 3.0])))
    assert not any("thin" in x for x in problems_of(counted([1e4, 1e4, 1e-3, 1e-3, 1e-3])))


@pytest.mark.parametrize(("ema", "remedy"), [("debiased", False), ("mmdet", True)])
def test_weights_that_explode_are_named_with_the_remedy(ema, remedy):
    found = problems_of(counted([1e6, 1e6, 1e6, 100.0], ema=ema))
    [problem] = [x for x in found if "explode" in x]
    assert "norm 0.875 weighs 7.5e+03" in problem
    assert "max_weight" in problem
    assert ("ema='debiased'" in problem) == remedy
    assert problems_of(counted([1e6, 1e6, 1e6, 100.0], max_weight=50.0)) == []
    assert problems_of(counted([1e6, 1e6, 1e6, 100.0], strength=0.5)) == []


def test_a_warning_comes_once():
    density = counted([1e9, 1.0, 1.0, 1.0])
    already = set()
    with pytest.warns(DensityWarning) as seen:
        warn_of(density, already)
    assert [str(x.message).partition(":")[0] for x in seen] == [
        "bins are too thin for the batch",
        "weights explode",
    ]
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of(density, already)


def test_what_keeps_no_average_is_well_and_cannot_be_looked_at():
    exact = GradientDensity(10, density="exact")
    assert exact.problems() == GradientDensity(10).problems() == []
    with pytest.raises(ValueError, match=r"exact.*keeps no average"):
        exact.plot()
    with pytest.raises(ValueError, match="counted nothing yet"):
        GradientDensity(10).plot()


@pytest.mark.parametrize("density", ["unit_region", "streaming"])
def test_a_density_is_drawn(density, tmp_path):
    classify, regress = GHMCLoss(density=density), GHMRLoss(density=density)
    softmax = GHMSoftmaxLoss(density=density)
    logits, labels = torch.randn(200, 5), torch.randint(0, 5, (200,))
    classify(logits, labels)
    regress(logits, torch.zeros_like(logits))
    softmax(logits, labels)
    for number, criterion in enumerate((classify, regress, softmax)):
        figure = criterion.density.plot()
        counts, weights, shares = figure.axes
        found = regions_of(criterion.density)
        bars = torch.tensor([bar.get_height() for bar in counts.patches])
        assert torch.equal(bars.double(), found.entries)
        assert torch.tensor([bar.get_height() for bar in shares.patches]).sum() == pytest.approx(
            1.0, rel=1e-5
        )  # read back as float32
        line = torch.from_numpy(weights.lines[0].get_ydata())
        used = found.entries > 0
        assert torch.equal(line[used], found.weights[used])
        assert bool(torch.isnan(line[~used]).all())
        picture = tmp_path / f"{number}.png"
        figure.savefig(picture)
        assert picture.stat().st_size > 1000
