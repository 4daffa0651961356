"""GHM-C a block at a time against the specification: the same regions, the same values."""

import dataclasses

import numpy as np
import pytest
import torch

from ghm_triton import cpu
from ghm_triton.reference import bce, binning
from ghm_triton.reference.interface import ClassificationInputs

BINS = 8
TABLE = torch.tensor([3.0, 0.0, 1e4, 1e-4, 0.5, 7.0, 1.0, 2.0])
SCALE = torch.tensor(0.125)
SHAPES = [(1, 1), (45, 1), (46, 1), (23, 7), (3, 100), (0, 5), (6, 45)]
pytestmark = pytest.mark.usefixtures("small_blocks")


def classification(logits, target, weight=None):
    """Inputs in the very rows and columns given, and without a look at their values."""
    index, dense = (None, target) if target.shape == logits.shape else (target, None)
    weight = None if weight is None else weight.expand(logits.shape)
    return ClassificationInputs(logits, index, dense, weight, logits.shape)


def draw(paper, shape, kind, generator, dtype=torch.float32):
    target = torch.rand(shape, generator=generator)
    if kind == "index":
        target = torch.randint(-1, shape[1] + 1, shape[:1], generator=generator)
    elif kind == "bool":
        target = target < 0.3
    elif kind == "double":
        target = target.double()
    return paper.draw_logits(shape, target, dtype, BINS, generator), target


def draw_weight(kind, shape, generator):
    if kind == "none":
        return None
    shape = {"entries": shape, "rows": (shape[0], 1), "columns": (1, shape[1])}[kind]
    return torch.randint(0, 3, shape, generator=generator).float()


def specification(logits, target, weight, *, outer, **options):
    """Loss and gradient of the specification, in float64."""
    x = logits.detach().double().requires_grad_()
    inputs = classification(x, target, weight)
    loss = bce.weighted_bce(inputs, TABLE.double(), SCALE.double(), **options)
    loss.backward(outer.double())
    return loss.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["index", "soft", "bool", "double"])
@pytest.mark.parametrize("weights", ["none", "entries", "rows", "columns"])
def test_counts(paper, generator, shape, kind, weights):
    logits, target = draw(paper, shape, kind, generator)
    inputs = classification(logits, target, draw_weight(weights, shape, generator))
    for bins in (1, BINS, 128):
        ours, theirs = cpu.count_bce(inputs, bins), binning.count_bce(inputs, bins)
        assert torch.equal(ours.regions, theirs.regions)
        assert ours.invalid == theirs.invalid == 0
        # Targets are added up in float32 within a block.
        assert ours.positives.sum() == pytest.approx(float(theirs.positives.sum()), rel=1e-6)
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype == its.dtype


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["index", "soft", "bool", "double"])
@pytest.mark.parametrize("weights", ["none", "entries", "rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduce", [False, True])
def test_loss_and_gradient(paper, generator, shape, kind, weights, weighted, reduce):
    logits, target = draw(paper, shape, kind, generator)
    weight = draw_weight(weights, shape, generator)
    outer = torch.tensor(-2.3) if reduce else torch.randn(shape, generator=generator)
    options = {"weighted": weighted, "reduce": reduce}
    truth, slopes = specification(logits, target, weight, outer=outer, **options)

    x = logits.requires_grad_()
    inputs = classification(x, target, weight)
    loss = cpu.weighted_bce(inputs, TABLE, SCALE, **options)
    loss.backward(outer)
    # Dense targets cancel; at most the largest weight, twice over, multiplies what they lose.
    lost = paper.cancellation(logits, target) * float(TABLE.max() * SCALE) * 2
    paper.assert_close(loss, truth, lost.sum() if reduce else lost)
    paper.assert_close(x.grad, slopes, lost * np.abs(outer.numpy()))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("reduce", [False, True])
def test_16_bit_logits(paper, generator, dtype, kind, reduce):
    logits, target = draw(paper, (23, 7), kind, generator, dtype)
    outer = torch.tensor(-2.3) if reduce else torch.randn(23, 7, generator=generator)
    options = {"weighted": False, "reduce": reduce}
    truth, slopes = specification(logits, target, None, outer=outer, **options)
    x = logits.requires_grad_()
    loss = cpu.weighted_bce(classification(x, target), TABLE, SCALE, **options)
    loss.backward(outer)
    lost = paper.cancellation(logits, target) * float(TABLE.max() * SCALE) * 2
    paper.assert_close(loss, truth, lost.sum() if reduce else lost)
    paper.assert_close(x.grad, slopes, lost * np.abs(outer.numpy()))
    assert (loss.dtype, x.grad.dtype) == (torch.float32, dtype)


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_strides(paper, generator, kind, layout):
    logits, target = draw(paper, (23, 7), kind, generator)
    if layout == "transposed":
        viewed = logits.t().contiguous().t()
    elif layout == "strided":
        viewed = torch.full((46, 21), torch.nan)[::2, ::3].copy_(logits)
    else:
        logits, target = logits[:1].expand(23, 7), target[:1].expand(23, *target.shape[1:])
        viewed = logits
    outer, options = torch.tensor(-2.3), {"weighted": False, "reduce": True}
    _, slopes = specification(logits, target, None, outer=outer, **options)
    x = viewed.detach().requires_grad_()
    inputs = classification(x, target)
    (cpu.weighted_bce(inputs, TABLE, SCALE, **options) * outer).backward()
    lost = paper.cancellation(logits, target) * float(TABLE.max() * SCALE) * 5
    paper.assert_close(x.grad, slopes, lost)
    counts = cpu.count_bce(inputs, BINS)
    assert torch.equal(counts.regions, binning.count_bce(inputs, BINS).regions)


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("bins", [30, 200])
def test_an_entry_is_counted_in_the_region_whose_weight_it_gets(generator, kind, bins):
    shape = (400, 7)  # at random, whatever is near an edge
    logits = torch.randn(shape, generator=generator) * 4
    target = torch.rand(shape, generator=generator)
    if kind == "index":
        target = torch.randint(0, 8, shape[:1], generator=generator)
    inputs = classification(logits, target)
    options = {"weighted": False, "reduce": False}
    one = torch.ones(())
    plain = cpu.weighted_bce(inputs, torch.ones(bins), one, **options)
    named = cpu.weighted_bce(inputs, torch.arange(1.0, bins + 1), one, **options)
    region = (named / plain).round().long() - 1
    counts = cpu.count_bce(inputs, bins)
    assert torch.equal(region.flatten().bincount(minlength=bins), counts.regions)


def test_exact_edges_and_ends():
    # p = 1/2 exactly, so g = p* is 0 and 1/4, 1/2, 3/4 are edges: an edge opens its region.
    logits = torch.tensor([[0.0, 0.0, 0.0, 1e4, -1e4, 1e4, -1e4]]).t()
    target = torch.tensor([[0.5, 0.25, 0.0, 1.0, 0.0, 0.0, 1.0]]).t()
    counts = cpu.count_bce(classification(logits, target), 4)
    assert counts.regions.tolist() == [3, 1, 1, 2]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["logits", "target", "index"])
@pytest.mark.parametrize("shape", [(23, 7), (3, 100)])
@pytest.mark.parametrize("weights", ["none", "entries"])
def test_unsound_entries_are_counted_apart(generator, poison, where, shape, weights):
    logits = torch.randn(shape, generator=generator)
    target = torch.rand(shape, generator=generator)
    if where == "index":
        target = torch.randint(-1, shape[1] + 1, shape[:1], generator=generator)
        target[2] = shape[1] + 1
    else:
        (logits if where == "logits" else target)[2, 5] = poison
        (logits if where == "logits" else target)[0, 1] = poison
    weight = draw_weight(weights, shape, generator)
    if weight is not None:
        weight[0, 1] = 0
    inputs = classification(logits, target, weight)
    ours, theirs = cpu.count_bce(inputs, BINS), binning.count_bce(inputs, BINS)
    assert ours.invalid == theirs.invalid
    assert torch.equal(ours.regions, theirs.regions)
    assert ours.positives.sum().isnan() == theirs.positives.sum().isnan()


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("reduce", [False, True])
def test_what_is_ignored_may_be_anything(paper, generator, kind, reduce):
    logits, target = draw(paper, (23, 7), kind, generator)
    weight = torch.ones(23, 7)
    weight[5:12, 2] = 0
    options = {"weighted": True, "reduce": reduce}
    clean = logits.clone().requires_grad_()
    given = classification(clean, target, weight)
    expected = cpu.weighted_bce(given, TABLE, SCALE, **options)
    expected.sum().backward()
    counts = cpu.count_bce(given, BINS)
    logits[5:12, 2] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 2 + [torch.nan])
    if kind == "soft":
        target = target.clone()
        target[5:12, 2] = torch.tensor([torch.inf, 5.0, -1.0, torch.nan] * 2)[:7]
    x = logits.requires_grad_()
    given = classification(x, target, weight)
    loss = cpu.weighted_bce(given, TABLE, SCALE, **options)
    loss.sum().backward()
    assert torch.equal(loss, expected)
    assert torch.equal(x.grad, clean.grad)
    assert torch.equal(cpu.count_bce(given, BINS).regions, counts.regions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", [False, True])
def test_nan_weights_make_everything_nan(generator, dtype, reduce):
    """As where an entry is not sound, on this rank or another; whatever is in the blocks."""
    nan = torch.full((BINS,), torch.nan)
    for poison in (0.0, torch.nan, torch.inf):
        logits = torch.randn(23, 7, generator=generator).to(dtype)
        logits[11, 3] = poison
        x = logits.requires_grad_()
        inputs = classification(x, torch.full((23,), 7))
        loss = cpu.weighted_bce(inputs, nan, nan[0], weighted=False, reduce=reduce)
        loss.sum().backward()
        assert loss.isnan().all()
        assert x.grad.isnan().all()
    none = classification(x[:0], torch.zeros(0, dtype=torch.int64))
    assert cpu.weighted_bce(none, nan, nan[0], weighted=False, reduce=True).isnan()


@pytest.mark.parametrize("wrong", [5.0, -300.0, torch.nan, torch.inf])
def test_nan_weights_with_any_target(generator, wrong):
    """No region is looked for outside the table."""
    x = torch.randn(23, 7, generator=generator, requires_grad=True)
    target = torch.zeros(23, 7)
    target[11, 3] = wrong
    nan = torch.full((BINS,), torch.nan)
    given = {"weighted": False, "reduce": True}
    loss = cpu.weighted_bce(classification(x, target), nan, nan[0], **given)
    loss.backward()
    assert loss.isnan()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("reduce", [False, True])
def test_what_lies_beside_an_unsound_entry_gets_its_gradient(paper, generator, dtype, kind, reduce):
    """Should the weights know nothing of it: the specification takes over for its block."""
    logits, target = draw(paper, (23, 7), kind, generator, dtype)
    weight = torch.ones(23, 7)
    outer = torch.tensor(-2.3) if reduce else torch.randn(23, 7, generator=generator)
    options = {"weighted": True, "reduce": reduce}
    _, slopes = specification(logits, target, weight, outer=outer, **options)
    logits[11, 3] = torch.nan
    if kind == "index":
        target[11] = 0
    x = logits.requires_grad_()
    loss = cpu.weighted_bce(classification(x, target, weight), TABLE, SCALE, **options)
    loss.backward(outer)
    assert loss.isnan().any()
    assert x.grad[11, 3].isnan()
    x.grad[11], slopes[11] = 0.0, 0.0
    lost = paper.cancellation(logits.nan_to_num(), target) * float(TABLE.max() * SCALE) * 2
    paper.assert_close(x.grad, slopes, lost * np.abs(outer.numpy()))


def test_inputs_are_left_as_they_are(generator):
    given = (
        torch.randn(23, 7, generator=generator, requires_grad=True),
        torch.rand(23, 7, generator=generator),
        torch.randint(0, 2, (23, 7), generator=generator).float(),
    )
    before = [tensor.detach().clone() for tensor in given]
    inputs = classification(*given)
    cpu.count_bce(inputs, BINS)
    cpu.weighted_bce(inputs, TABLE, SCALE, weighted=True, reduce=True).backward()
    for tensor, was in zip(given, before, strict=True):
        assert torch.equal(tensor.detach(), was)


def test_other_defaults_of_torch_change_nothing(generator):
    logits, target = torch.randn(23, 7, generator=generator), torch.randint(0, 8, (23,))
    inputs = classification(logits, target)
    expected = cpu.weighted_bce(inputs, TABLE, SCALE, weighted=False, reduce=True)
    regions = cpu.count_bce(inputs, BINS).regions
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            inputs = dataclasses.replace(inputs)
            loss = cpu.weighted_bce(inputs, TABLE, SCALE, weighted=False, reduce=True)
            counts = cpu.count_bce(inputs, BINS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(loss, expected)
    assert torch.equal(counts.regions, regions)
