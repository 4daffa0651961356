"""The gradient that is computed with the loss: reuse, second derivatives, threads and memory."""

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ghm_triton import focal_loss, ghm_c_loss, ghm_r_loss, ghm_softmax_loss
from ghm_triton.cpu import blocks
from tests.ghm_triton.cpu.cases import CASES, draw, loss_of, replace, values_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def make(generator):
    """Predictions that require a gradient, and their loss."""

    def make(case, dtype=torch.float32, **options):
        inputs = draw(case, (23, 7), generator, dtype)
        x = values_of(inputs).requires_grad_()
        return x, lambda: loss_of(case, replace(inputs, x), **options)

    return make


@cases
@dtypes
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_a_retained_graph_gives_the_same_again(make, case, dtype, reduce):
    x, loss = make(case, dtype, reduce=reduce)
    loss = loss()
    outer = torch.tensor(-4.0).expand_as(loss)  # a power of two: no rounding
    (plain,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    slopes = [torch.autograd.grad(loss, x, outer, retain_graph=True)[0] for _ in range(2)]
    slopes.append(torch.autograd.grad(loss, x, outer)[0])
    for slope in slopes:
        # Of float16 below 2^-14, whose spacing does not shrink, rounding comes after the product.
        torch.testing.assert_close(slope, plain * -4.0, rtol=0, atol=2**-22 * (dtype == DTYPES[1]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x, outer)


@cases
@dtypes
def test_the_returned_gradient_is_not_the_retained_one(make, case, dtype):
    x, loss = make(case, dtype)
    loss = loss()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@cases
@pytest.mark.parametrize("outer", [1.0, 2.0])
def test_the_saved_gradient_is_scaled_in_place_unless_the_graph_is_retained(make, case, outer):
    x, loss = make(case)
    loss = loss()
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    (loss * outer).backward()
    assert x.grad.data_ptr() == kept


@cases
@dtypes
def test_a_second_derivative_is_refused(make, case, dtype):
    x, loss = make(case, dtype)
    (slope,) = torch.autograd.grad(loss(), x, create_graph=True)
    assert torch.equal(slope, torch.autograd.grad(loss(), x)[0])
    with pytest.raises(RuntimeError, match="differentiated once"):
        slope.sum().backward()


@cases
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(make, case, context):
    _, loss = make(case)
    expected = loss().detach()
    with context():
        found = loss()
    assert not found.requires_grad
    assert torch.equal(found, expected)


@cases
@dtypes
def test_changing_the_inputs_before_backward(make, case, dtype):
    """An error where the gradient is yet to be computed; no matter where it is there."""
    x, loss = make(case, dtype)
    (expected,) = torch.autograd.grad(loss(), x)
    loss = loss()
    with torch.no_grad():
        x += 1
    if dtype == torch.float16:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(x.grad, expected)


@cases
def test_many_upstream_gradients_at_once(make, case):
    """As `torch.autograd.functional.jacobian(vectorize=True)` needs."""
    x, loss = make(case, reduce=False)
    losses = loss()
    (expected,) = torch.autograd.grad(losses.sum(), x, retain_graph=True)
    outer = torch.eye(losses.numel()).view(-1, *losses.shape)
    (slopes,) = torch.autograd.grad(losses, x, outer, is_grads_batched=True)
    assert torch.equal(slopes.sum(0), expected)


@cases
@dtypes
def test_a_backward_pass_on_another_thread(make, case, dtype):
    x, loss = make(case, dtype)
    (expected,) = torch.autograd.grad(loss(), x)
    thread = threading.Thread(target=loss().backward)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize(
    ("kind", "buffers"),
    [("index", 3), ("dense", 3), ("weight", 3), ("regression", 4), ("focal", 4), ("softmax", 3)],
)
def test_peak_memory_is_one_gradient_and_the_working_memory(monkeypatch, kind, buffers):
    """Four million logits: 1.1 times their 16 MB, and 4 bytes per buffer and entry of a block."""
    monkeypatch.setattr(blocks, "_local", threading.local())
    x = torch.zeros(50000, 80, requires_grad=True)
    index = torch.zeros(50000, dtype=torch.int64)
    losses = {
        "index": lambda: ghm_c_loss(x, index),
        "dense": lambda: ghm_c_loss(x, torch.zeros(1).expand(50000, 80)),
        "weight": lambda: ghm_c_loss(x, index, torch.ones(50000, 1), weighted=True),
        "regression": lambda: ghm_r_loss(x, torch.zeros(1).expand(50000, 80)),
        "focal": lambda: focal_loss(x, index),
        "softmax": lambda: ghm_softmax_loss(x, index),
    }
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        (losses[kind]() * 2.0).backward()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    assert held >= 16_000_000  # the gradient is there
    assert peak <= 1.1 * 16_000_000 + 4 * buffers * blocks.block_entries() + 1024
