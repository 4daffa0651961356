"""GHM-R a block at a time against the specification."""

import numpy as np
import pytest
import torch

from ghm_triton import cpu
from ghm_triton.reference import asl1, binning
from ghm_triton.reference.interface import RegressionInputs

BINS = 5
TABLE = torch.tensor([3.0, 0.0, 1e4, 1e-4, 0.5])
SCALE = torch.tensor(0.125)
SHAPES = [(1, 1), (45, 1), (46, 1), (30, 4), (2, 100), (0, 4)]
pytestmark = pytest.mark.usefixtures("small_blocks")


def regression(pred, target, weight=None):
    """Inputs in the very rows and columns given, and without a look at their values."""
    weight = None if weight is None else weight.expand(pred.shape)
    return RegressionInputs(pred, target, weight, pred.shape)


def draw(paper, shape, generator, dtype=torch.float32, mu=0.02):
    target = torch.randn(shape, generator=generator)
    return paper.draw_pred(target, dtype, BINS, mu, generator, spread=2 * mu), target


def draw_weight(kind, shape, generator):
    if kind == "none":
        return None
    shape = shape if kind == "entries" else (shape[0], 1)
    return torch.randint(0, 3, shape, generator=generator).float()


def specification(pred, target, weight, *, outer, **options):
    """Loss and gradient of the specification, in float64."""
    x = pred.detach().double().requires_grad_()
    inputs = regression(x, target, weight)
    loss = asl1.weighted_asl1(inputs, TABLE.double(), SCALE.double(), **options)
    loss.backward(outer.double())
    return loss.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["none", "entries", "rows"])
@pytest.mark.parametrize("mu", [0.02, 1.0])
def test_counts(paper, generator, shape, weights, mu):
    pred, target = draw(paper, shape, generator, mu=mu)
    inputs = regression(pred, target, draw_weight(weights, shape, generator))
    for bins in (1, BINS, 128):
        ours, theirs = cpu.count_asl1(inputs, bins, mu), binning.count_asl1(inputs, bins, mu)
        assert torch.equal(ours.regions, theirs.regions)
        assert ours.positives.tolist() == theirs.positives.tolist()
        assert ours.invalid == theirs.invalid == 0


@pytest.mark.parametrize("bins", [10, 1000])
@pytest.mark.parametrize("mu", [0.02, 1.0, 3.7])
def test_regions_are_those_of_the_specification_to_the_bit(generator, bins, mu):
    """Whatever is near an edge: both round alike."""
    pred = torch.randn(500, 7, generator=generator) * mu
    # 3-4-5 triangles: g is 3/5 and 4/5 exactly, or nearly.
    pred[:2] = torch.tensor([[0.75 * mu], [4 / 3 * mu]])
    inputs = regression(pred, torch.zeros(500, 7))
    ours, theirs = cpu.count_asl1(inputs, bins, mu), binning.count_asl1(inputs, bins, mu)
    assert torch.equal(ours.regions, theirs.regions)
    given = {"mu": mu, "weighted": False, "reduce": False}
    table, one = torch.arange(1.0, bins + 1), torch.ones(())
    torch.testing.assert_close(  # weights of whole numbers: an ulp of the loss, times two
        cpu.weighted_asl1(inputs, table, one, **given),
        asl1.weighted_asl1(inputs, table, one, **given),
        rtol=4 * torch.finfo(torch.float32).eps,
        atol=0.0,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["none", "entries", "rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradient(paper, generator, shape, weights, weighted, reduce, dtype):
    pred, target = draw(paper, shape, generator, dtype)
    weight = draw_weight(weights, shape, generator)
    outer = torch.tensor(-2.3) if reduce else torch.randn(shape, generator=generator)
    options = {"mu": 0.02, "weighted": weighted, "reduce": reduce}
    truth, slopes = specification(pred, target, weight, outer=outer, **options)
    x = pred.requires_grad_()
    loss = cpu.weighted_asl1(regression(x, target, weight), TABLE, SCALE, **options)
    loss.backward(outer)
    paper.assert_close(loss, truth)
    paper.assert_close(x.grad, slopes)
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_strides_and_a_target_in_double_precision(paper, generator, layout):
    pred, target = draw(paper, (30, 4), generator)
    outer, options = torch.tensor(-2.3), {"mu": 0.02, "weighted": False, "reduce": True}
    truth, slopes = specification(pred, target, None, outer=outer, **options)
    viewed = pred.t().contiguous().t()
    if layout == "strided":
        viewed = torch.full((60, 12), torch.nan)[::2, ::3].copy_(pred)
    x = viewed.detach().requires_grad_()
    inputs = regression(x, target.double())
    loss = cpu.weighted_asl1(inputs, TABLE, SCALE, **options)
    loss.backward(outer)
    paper.assert_close(loss, truth)
    paper.assert_close(x.grad, slopes)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weights", ["none", "entries"])
def test_unsound_entries_are_counted_apart(generator, poison, weights):
    pred = torch.randn(30, 4, generator=generator)
    pred[2, 3], pred[0, 1] = poison, poison
    weight = draw_weight(weights, (30, 4), generator)
    if weight is not None:
        weight[0, 1] = 0
        weight[2, 3] = 1
    inputs = regression(pred, torch.zeros(30, 4), weight)
    ours = cpu.count_asl1(inputs, BINS, 0.02)
    theirs = binning.count_asl1(inputs, BINS, 0.02)
    assert ours.invalid == theirs.invalid == (2 if weight is None else 1)
    assert torch.equal(ours.regions, theirs.regions)
    assert ours.positives.tolist() == theirs.positives.tolist()


def test_what_is_ignored_may_be_anything(paper, generator):
    pred, target = draw(paper, (30, 4), generator)
    weight = torch.ones(30, 4)
    weight[5:9, 1] = 0
    options = {"mu": 0.02, "weighted": True, "reduce": True}
    clean = pred.clone().requires_grad_()
    given = regression(clean, target, weight)
    expected = cpu.weighted_asl1(given, TABLE, SCALE, **options)
    expected.backward()
    counts = cpu.count_asl1(given, BINS, 0.02)
    pred[5:9, 1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])
    x = pred.requires_grad_()
    given = regression(x, target, weight)
    loss = cpu.weighted_asl1(given, TABLE, SCALE, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, clean.grad)
    assert torch.equal(cpu.count_asl1(given, BINS, 0.02).regions, counts.regions)


@pytest.mark.parametrize("mu", [1e-30, 0.02, 1e10])
def test_differences_of_any_size(paper, mu):
    """Neither the squares of the largest overflow, nor do those of the smallest vanish."""
    d = torch.tensor([0.0, 1e-20, 1e-6, 1e-3, 1.0, 1e10, 1e17, 1e19, -1e25, 1e38])
    x = d[:, None].clone().requires_grad_()
    inputs = regression(x, torch.zeros(10, 1))
    assert cpu.count_asl1(inputs, 4, mu).invalid == 0
    one = torch.ones(1)
    given = {"mu": mu, "weighted": False, "reduce": False}
    loss = cpu.weighted_asl1(inputs, one, one[0], **given)
    loss.backward(torch.ones(10, 1))
    losses, slopes = paper.asl1_parts(paper.as_numpy(d)[:, None], mu)
    # Below 1e-18, what `mu` is counts for nothing but the smallest differences.
    lost = 1e-18 if mu < 1e-18 else 0.0
    paper.assert_close(loss, losses, lost)
    there = slice(2, None) if mu < 1e-18 else slice(None)
    paper.assert_close(x.grad[there], slopes[there])
    assert x.grad[0] == 0


def test_nan_weights_make_everything_nan(generator):
    nan = torch.full((BINS,), torch.nan)
    given = {"mu": 0.02, "weighted": False, "reduce": True}
    for poison in (0.0, torch.nan):
        x = torch.randn(30, 4, generator=generator)
        x[17, 2] = poison
        x.requires_grad_()
        inputs = regression(x, torch.zeros(30, 4))
        loss = cpu.weighted_asl1(inputs, nan, nan[0], **given)
        loss.backward()
        assert loss.isnan()
        assert x.grad.isnan().all()
    none = regression(x[:0], x[:0])
    assert cpu.weighted_asl1(none, nan, nan[0], **given).isnan()
    assert np.isfinite(float(cpu.weighted_asl1(none, TABLE, SCALE, **given).detach()))
