"""Which implementation stands behind the names of `cpu`."""

import pytest
import torch

from ghm_triton import cpu, reference
from ghm_triton.losses.inputs import classification_inputs, regression_inputs
from ghm_triton.reference import asl1, bce, binning
from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs

TABLE, ONE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(1.0)


def by_class(x):
    target = torch.full((6,), 1, device=x.device)
    inputs = classification_inputs(x, target, None, False)
    return cpu.weighted_bce(inputs, TABLE, ONE, weighted=False, reduce=True)


def by_box(x):
    inputs = regression_inputs(x, torch.zeros_like(x), None, False)
    return cpu.weighted_asl1(inputs, TABLE, ONE, mu=0.02, weighted=False, reduce=True)


@pytest.mark.parametrize("loss", [by_class, by_box])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_blocks_run_on_the_cpu_except_in_double_precision(loss, dtype):
    x = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    blockwise = "Blockwise" in loss(x).grad_fn.name()
    assert blockwise == (dtype != torch.float64)


@pytest.mark.parametrize("loss", [by_class, by_box])
def test_gradients_in_double_precision_any_number_of_times(loss):
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    # Steps this small move no entry to the next region.
    assert torch.autograd.gradcheck(loss, x, eps=1e-7, atol=1e-6)
    assert torch.autograd.gradgradcheck(loss, x, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("loss", [by_class, by_box])
def test_within_transforms(loss):
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    _, slope = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, expected.sum())


def test_without_data():
    x = torch.randn(6, 4, device="meta")
    inputs = classification_inputs(x, torch.zeros(6, 4, device="meta"), None, None)
    assert cpu.count_bce(inputs, 4).regions.shape == (4,)
    counts = cpu.count_asl1(regression_inputs(x, x, None, None), 4, 0.02)
    assert counts.regions.shape == (4,)


@pytest.mark.parametrize("kind", ["index", "dense", "box"])
def test_one_graph_when_compiled(kind):
    """No look at a value, no shape that depends on one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    target = torch.rand(40, 3, generator=generator)
    if kind == "index":
        target = torch.randint(-1, 4, (40,), generator=generator)

    def train(x, target):
        weight = torch.ones(40, 3)
        if kind == "box":
            given = RegressionInputs(x, target, weight, x.shape)
            counts = cpu.count_asl1(given, 4, 0.02)
            table = counts.regions.float()
            return counts.regions, cpu.weighted_asl1(
                given, table, ONE, mu=0.02, weighted=True, reduce=True
            )
        index, dense = (target, None) if kind == "index" else (None, target)
        given = ClassificationInputs(x, index, dense, weight, x.shape)
        counts = cpu.count_bce(given, 4)
        table = counts.regions.float()
        return counts.regions, cpu.weighted_bce(given, table, ONE, weighted=True, reduce=True)

    torch.compiler.reset()
    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    slopes, counted = [], []
    for function in (train, compiled):
        leaf = x.clone().requires_grad_()
        regions, loss = function(leaf, target)
        counted.append(regions)
        slopes.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*counted)
    torch.testing.assert_close(*slopes)


def test_the_specification_and_the_public_names_agree_on_what_they_take():
    """One signature, so that either can be called by the same name."""
    import inspect

    for name, home in (
        ("count_bce", binning),
        ("count_asl1", binning),
        ("weighted_bce", bce),
        ("weighted_asl1", asl1),
    ):
        public = inspect.signature(getattr(cpu, name), eval_str=True)
        for module in (home, reference):
            assert inspect.signature(getattr(module, name), eval_str=True) == public
