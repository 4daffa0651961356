"""The kernels as PyTorch's operators: what a compiler is told of them is true."""

import pytest
import torch

from ghm_triton.ops import backend  # noqa: F401 - registers them

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]

BINS = 8


@pytest.fixture
def data(device):
    """Logits, class indices, dense targets, weights, a table and a scale."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 5, generator=generator) * 3
    index = torch.randint(-1, 6, (30,), generator=generator)
    dense, weight = torch.rand(2, 30, 5, generator=generator)
    table, scale = torch.rand(BINS, generator=generator), torch.tensor(0.3)
    return tuple(t.to(device) for t in (logits, index, dense, weight, table, scale))


def check(operator, *arguments):
    torch.library.opcheck(operator.default, arguments)  # raises what is wrong


@pytest.mark.parametrize("kind", ["index", "dense"])
def test_counting(data, kind):
    logits, index, dense, weight, _, _ = data
    target = index if kind == "index" else dense
    check(torch.ops.ghm.count_bce, logits, target, None if kind == "index" else weight, BINS)
    check(torch.ops.ghm.count_asl1, logits, dense, None, BINS, 0.02)


@pytest.mark.parametrize(("reduce", "gradient"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("wanted", [True, False])
def test_losses(data, reduce, gradient, wanted):
    logits, index, dense, weight, table, scale = data
    x = logits.requires_grad_(wanted)
    tail = (table, scale)
    options = (reduce, gradient and wanted)
    check(torch.ops.ghm.weighted_bce, x, index, None, *tail, False, *options)
    check(torch.ops.ghm.weighted_asl1, x, dense, weight, *tail, 0.02, True, *options)


def test_their_gradients(data):
    logits, _, dense, weight, table, scale = data
    whole, entries = torch.tensor(2.0, device=logits.device), torch.rand_like(logits)
    for outer in (whole, entries):
        inputs = (logits, dense, weight, table, scale, outer)
        check(torch.ops.ghm.weighted_bce_backward, *inputs, True)
        check(torch.ops.ghm.weighted_asl1_backward, *inputs, 0.02, True)
    check(torch.ops.ghm.scale_gradient, entries, whole)


@pytest.mark.parametrize(("reduce", "gradient"), [(True, True), (True, False), (False, False)])
def test_focal_and_softmax(data, reduce, gradient):
    logits, index, dense, weight, table, scale = data
    x = logits.requires_grad_()
    options = (reduce, gradient)
    kind = (index, None) if reduce else (dense, weight)
    check(torch.ops.ghm.focal, x, *kind, scale, 0.25, 1.5, not reduce, *options)
    rows = (x, index % 5, None if reduce else weight[:, 0], table, scale)
    check(torch.ops.ghm.weighted_softmax, *rows, not reduce, *options)


def test_the_gradients_of_focal_and_softmax(data):
    logits, index, dense, weight, table, scale = data
    check(torch.ops.ghm.count_softmax, logits, index % 5, None, BINS)
    whole, entries = torch.tensor(2.0, device=logits.device), torch.rand_like(logits)
    inputs = (logits, dense, weight, scale)
    check(torch.ops.ghm.focal_backward, *inputs, entries, 0.25, 2.0, True)
    rows = (logits, index % 5, weight[:, 0], table, scale)
    for outer in (whole, entries[:, 0]):
        check(torch.ops.ghm.weighted_softmax_backward, *rows, outer, True)


@pytest.mark.parametrize("persist", [True, False])
def test_density(device, persist):
    regions = torch.arange(BINS, device=device)
    positives = torch.ones(3, dtype=torch.float64, device=device)
    smoothed = torch.rand(BINS, device=device)
    updates, invalid = torch.zeros(2, dtype=torch.int64, device=device)
    strength = torch.tensor(0.5, device=device)
    check(
        torch.ops.ghm.update_density,
        *(regions, positives, invalid.clone(), smoothed, updates.clone(), strength),
        *(0.75, "debiased", "valid_bins", 3.0, persist, "positives", 2.0),
    )
