"""Every loss in blocks against the specification, at the edges of blocks."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from ghm_triton import reference
from ghm_triton.cpu.blocks import block_entries, supports
from tests.ghm_triton.cpu.cases import (
    CASES,
    COUNTED,
    SCALE,
    TABLE,
    count,
    draw,
    evaluate,
    loss_of,
    replace,
    values_of,
)

SHAPES = [(1, 1), (45, 1), (46, 1), (23, 7), (3, 100), (0, 5), (6, 45)]
WEIGHTS = {"none": None, "entries": (1, 1), "rows": (1, 0), "columns": (0, 1)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISONS = [torch.nan, torch.inf, -torch.inf]
small_blocks = pytest.mark.usefixtures("small_blocks")


def draw_weight(kind, shape, generator):
    if WEIGHTS[kind] is None:
        return None
    shape = [n if full else 1 for n, full in zip(shape, WEIGHTS[kind], strict=True)]
    return torch.randint(0, 3, shape, generator=generator).float()


def weight_of(case, shape):
    """Ones, `[R, C]`, or all that softmax looks at."""
    return torch.ones(shape[0], 1 if case == "softmax" else shape[1])


def in_double(inputs):
    return replace(inputs, values_of(inputs).double())


@small_blocks
@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", ["none", "entries", "rows", "columns"])
def test_counts(generator, case, shape, weights):
    if case == "softmax" and weights == "columns":
        weights = "rows"
    inputs = draw(case, shape, generator, weight=draw_weight(weights, shape, generator))
    for bins in (1, 8, 128):
        ours, theirs = count(case, inputs, bins), count(case, inputs, bins, reference)
        assert torch.equal(ours.regions, theirs.regions)
        assert ours.invalid == theirs.invalid == 0
        # Targets are added up in float32 within a block.
        assert ours.positives.sum() == pytest.approx(float(theirs.positives.sum()), rel=1e-6)
        for mine, its in zip(ours, theirs, strict=True):
            assert mine.dtype == its.dtype


@small_blocks
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [False, True])
def test_loss_and_gradient(generator, case, shape, dtype, reduce):
    for weights, weighted in itertools.product(("none", "entries", "rows"), (False, True)):
        weight = draw_weight(weights, shape, generator)
        inputs = draw(case, shape, generator, dtype, weight)
        options = {"weighted": weighted, "reduce": reduce}
        loss, slope = evaluate(case, inputs, **options)
        truth = evaluate(case, in_double(inputs), table=TABLE.double(), module=reference, **options)
        assert (loss.dtype, slope.dtype) == (torch.float32, dtype)
        # Dense targets cancel: `p - p*` keeps the digits of `p`. Entries are added in float32.
        torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-6)
        rounding = max(1e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(slope.double(), truth[1], rtol=rounding, atol=2e-6)


@small_blocks
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_entries_that_are_not_finite_are_counted_apart_and_are_nan(
    generator, case, poison, weighted
):
    weight = weight_of(case, (23, 7))
    weight[2] = 0
    inputs = draw(case, (23, 7), generator, weight=weight)
    if inputs_index(inputs) is not None:
        inputs.index[11] = 0
    clean = evaluate(case, inputs, reduce=False, weighted=weighted)
    values_of(inputs)[[2, 11], 3] = poison
    if case in COUNTED:
        ours, theirs = count(case, inputs), count(case, inputs, module=reference)
        assert ours.invalid == theirs.invalid == 1
        assert torch.equal(ours.regions, theirs.regions)
    loss, slope = evaluate(case, inputs, reduce=False, weighted=weighted)
    if case != "softmax":
        assert loss[11, 3].isnan()
        assert slope[11, 3].isnan()
    assert loss[11].isnan().any()
    others = torch.arange(23) != 11
    # A block that is read with care has the same bits.
    assert torch.equal(loss[others], clean[0][others])
    assert torch.equal(slope[others], clean[1][others])


def inputs_index(inputs):
    return getattr(inputs, "index", None)


@small_blocks
@pytest.mark.parametrize("case", [case for case in CASES if "soft" in case and case != "softmax"])
@pytest.mark.parametrize("wrong", [5.0, -300.0, torch.nan, torch.inf, -1e-30])
def test_dense_targets_out_of_range(generator, case, wrong):
    weight = torch.ones(23, 7)
    inputs = draw(case, (23, 7), generator, weight=weight)
    inputs.target[11, 3] = wrong
    loss, slope = evaluate(case, inputs, reduce=False)
    assert loss[11, 3].isnan()
    assert slope[11, 3].isnan()
    assert loss.isnan().sum() == 1
    if case in COUNTED:
        assert count(case, inputs).invalid == 1
    weight[11, 3] = 0
    assert evaluate(case, inputs)[0].isfinite()


@small_blocks
@pytest.mark.parametrize("case", ["bce-index", "focal-index", "softmax"])
@pytest.mark.parametrize("above", [8, 2**40])
def test_class_indices_out_of_range(generator, case, above):
    inputs = draw(case, (23, 7), generator, weight=weight_of(case, (23, 7)))
    inputs.index[11] = above
    loss, slope = evaluate(case, inputs, reduce=False)
    assert loss[11].isnan().all()
    if case != "softmax":
        assert slope[11].isnan().all()
    assert loss[torch.arange(23) != 11].isfinite().all()
    if case in COUNTED:
        ours, theirs = count(case, inputs), count(case, inputs, module=reference)
        assert ours.invalid == theirs.invalid
        assert torch.equal(ours.regions, theirs.regions)


@small_blocks
@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("bins", [8, 200])
def test_nan_weights_make_everything_nan(generator, case, dtype, reduce, bins):
    """As when an entry is invalid, on this rank or on another."""
    nan = torch.full((bins,), torch.nan)
    for poison in (0.0, *POISONS):
        inputs = draw(case, (23, 7), generator, dtype)
        values_of(inputs)[11, 3] = poison
        for result in evaluate(case, inputs, table=nan, scale=nan[0], reduce=reduce):
            assert result.isnan().all()
    none = draw(case, (0, 7), generator)
    assert loss_of(case, none, table=nan, scale=nan[0]).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["bce-index", "asl1"])
@pytest.mark.parametrize("bins", [10, 126, 127])
def test_counting_and_weighing_agree_about_every_number_of_16_bits(case, dtype, bins):
    """Both find the region of the specification, to the bit, in pairs and one by one."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = patterns[patterns.isfinite()].view(-1, 1)
    generator = torch.Generator().manual_seed(0)
    inputs = draw(case, values.shape, generator)
    if case == "asl1":
        inputs.target.zero_()
        d = values.float()
        norm = d.abs() / reference.losses.hypotenuse(d, 0.02)
    else:
        inputs.index.fill_(1)
        norm = torch.sigmoid(values.float())
    inputs = replace(inputs, values)
    region = reference.losses.unit_region(norm, bins)
    counts = count(case, inputs, bins).regions
    assert torch.equal(counts, region.flatten().bincount(minlength=bins))
    one, options = torch.tensor(2.0**-20), {"reduce": False}  # nothing overflows
    plain = loss_of(case, inputs, table=torch.ones(bins), scale=one, **options)
    named = loss_of(case, inputs, table=torch.arange(1.0, bins + 1), scale=one, **options)
    shows = plain > 1e-30  # the ratio of two losses is the weight
    assert torch.equal((named / plain)[shows].round().long() - 1, region[shows])


@pytest.mark.parametrize("case", CASES)
def test_other_defaults_of_torch_change_nothing(generator, case):
    weight = draw_weight("rows", (23, 7), generator)
    inputs = draw(case, (23, 7), generator, weight=weight)
    values_of(inputs)[weight[:, 0] == 0] = torch.nan
    outer = torch.tensor(-2.3)
    expected = evaluate(case, inputs, outer)
    counted = count(case, inputs) if case in COUNTED else None
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = evaluate(case, inputs, outer)
            counts = count(case, inputs) if case in COUNTED else None
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    if counts is not None:
        assert all(torch.equal(*pair) for pair in zip(counts, counted, strict=True))


class TestWhereBlocksAreSupported:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
    def test_every_dtype_but_float64(self, generator, case, dtype):
        inputs = draw(case, (6, 4), generator)
        loss = loss_of(case, replace(inputs, values_of(inputs).to(dtype).requires_grad_()))
        assert ("Blockwise" in loss.grad_fn.name()) == (dtype != torch.float64)

    @pytest.mark.parametrize("case", CASES)
    def test_float64_has_derivatives_of_any_order(self, generator, case):
        inputs = in_double(draw(case, (6, 4), generator))

        def loss(x):
            return loss_of(case, replace(inputs, x))

        x = values_of(inputs).requires_grad_()
        # Steps this small move no entry to the next region.
        assert torch.autograd.gradcheck(loss, x, eps=1e-7, atol=1e-6)
        assert torch.autograd.gradgradcheck(loss, x, eps=1e-7, atol=1e-5)

    @pytest.mark.parametrize("case", CASES)
    def test_the_specification_runs_within_transforms(self, generator, case):
        inputs = draw(case, (6, 4), generator)

        def loss(x):
            assert supports(replace(inputs, x)) == (type(x) is torch.nn.Parameter)
            return loss_of(case, replace(inputs, x))

        x = values_of(inputs)
        leaf = torch.nn.Parameter(x)
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
        _, slope = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(slope, expected.sum())
        torch.func.vmap(loss)(x.expand(2, 6, 4))
        with forward_ad.dual_level():
            loss(forward_ad.make_dual(x, torch.ones_like(x)))

    @pytest.mark.parametrize("case", CASES)
    def test_the_specification_runs_without_data_and_on_subclasses(self, generator, case):
        class Other(torch.Tensor):
            pass

        inputs = draw(case, (6, 4), generator)
        assert not supports(replace(inputs, values_of(inputs).as_subclass(Other)))
        assert not supports(replace(inputs, values_of(inputs).to("meta")))
        assert supports(inputs, SCALE)
        assert not supports(inputs, SCALE.to("meta"))

    @pytest.mark.parametrize("case", COUNTED)
    def test_one_graph_when_compiled(self, generator, case):
        inputs = draw(case, (40, 3), generator, weight=weight_of(case, (40, 3)))

        def train(values):
            given = replace(inputs, values)
            counts = count(case, given)
            return counts.regions, loss_of(case, given, table=counts.regions.float())

        torch.compiler.reset()
        compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
        results = []
        for function in (train, compiled):
            leaf = values_of(inputs).clone().requires_grad_()
            regions, loss = function(leaf)
            results.append((regions, torch.autograd.grad(loss, leaf)[0]))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1])

    def test_rows_of_softmax_that_fit_a_block(self, monkeypatch, generator):
        monkeypatch.setattr("ghm_triton.cpu.softmax.block_entries", lambda: 7)
        for classes, whole in ((7, True), (8, False)):
            inputs = draw("softmax", (5, classes), generator)
            values = inputs.logits.requires_grad_()
            loss = loss_of("softmax", replace(inputs, values))
            assert ("Blockwise" in loss.grad_fn.name()) == whole
        assert block_entries() >= 2**18
