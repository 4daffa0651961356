"""The gradient that is formed with the loss: once, kept, and scaled later."""

import threading

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ghm_triton import cpu, ghm_c_loss, ghm_r_loss
from ghm_triton.cpu import blocks, scratch
from ghm_triton.reference.interface import ClassificationInputs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TABLE = torch.tensor([3.0, 0.5, 1.0, 7.0])


@pytest.fixture
def target(generator):
    return torch.randint(0, 8, (23,), generator=generator)


def classification(logits, target, weight=None):
    """Inputs in the very rows and columns given, and without a look at their values."""
    index, dense = (None, target) if target.shape == logits.shape else (target, None)
    weight = None if weight is None else weight.expand(logits.shape)
    return ClassificationInputs(logits, index, dense, weight, logits.shape)


def loss_of(x, target, reduce=True):
    inputs = classification(x, target)
    given = {"weighted": False, "reduce": reduce}
    return cpu.weighted_bce(inputs, TABLE, torch.tensor(0.125), **given)


def draw(generator, dtype=torch.float32):
    return (torch.randn(23, 7, generator=generator) * 3).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_a_graph_that_is_retained_gives_the_same_again(generator, target, dtype, reduce):
    x = draw(generator, dtype)
    loss = loss_of(x, target, reduce)
    outer = torch.tensor(-4.0).expand_as(loss)  # a power of two: no rounding
    (plain,) = torch.autograd.grad(loss, x, torch.ones_like(loss), retain_graph=True)
    slopes = [torch.autograd.grad(loss, x, outer, retain_graph=True)[0] for _ in range(2)]
    slopes.append(torch.autograd.grad(loss, x, outer)[0])
    for slope in slopes:
        assert torch.equal(slope, plain * -4.0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x, outer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_returned_is_not_what_is_retained(generator, target, dtype):
    x = draw(generator, dtype)
    loss = loss_of(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


@pytest.mark.parametrize("outer", [1.0, 2.0])
def test_without_retaining_no_second_gradient_is_made(generator, target, outer):
    x = draw(generator)
    loss = loss_of(x, target)
    kept = loss.grad_fn.saved_tensors[0].data_ptr()
    (loss * outer).backward()
    assert x.grad.data_ptr() == kept


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_second_derivative(generator, target, dtype):
    x = draw(generator, dtype)
    loss = loss_of(x, target)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    assert torch.equal(slope, torch.autograd.grad(loss, x)[0])
    with pytest.raises(RuntimeError, match="differentiated once"):
        slope.sum().backward()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(generator, target, context):
    x = draw(generator)
    expected = loss_of(x, target).detach()
    with context():
        loss = loss_of(x, target)
    assert not loss.requires_grad
    assert torch.equal(loss, expected)
    assert not loss_of(x.detach(), target).requires_grad


@pytest.mark.usefixtures("small_blocks")
def test_a_loss_scale_multiplies_before_rounding_to_float16(target):
    """1e-9 is nothing in float16, whose smallest number is 6e-8; times 65,536 it is something."""
    x = torch.full((23, 7), -15.0, dtype=torch.float16, requires_grad=True)
    loss = loss_of(x, torch.full_like(target, 7))
    (loss * 65536.0).backward()
    norm = torch.sigmoid(torch.tensor(-15.0, dtype=torch.float64))
    expected = (65536.0 * 3.0 * 0.125 * norm).half()
    assert expected > 0
    # The float32 before the rounding may be an ulp off, which moves the rounding by a step.
    torch.testing.assert_close(x.grad, expected.expand(23, 7), rtol=2**-10, atol=2**-24)


def test_changing_the_inputs_of_a_gradient_yet_to_be_formed_is_an_error(generator, target):
    x = draw(generator, torch.float16)
    loss = loss_of(x, target)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_inputs_matters_to_no_gradient_that_was_formed(generator, target):
    x = draw(generator)
    (expected,) = torch.autograd.grad(loss_of(x, target), x)
    loss = loss_of(x, target)
    with torch.no_grad():
        x += 1
    target += 1
    loss.backward()
    assert torch.equal(x.grad, expected)


def test_many_outer_gradients_at_once(generator, target):
    """As `torch.autograd.functional.jacobian(vectorize=True)` asks for."""
    x = draw(generator)
    entries = loss_of(x, target, reduce=False)
    (expected,) = torch.autograd.grad(entries.sum(), x, retain_graph=True)
    outer = torch.eye(161).view(161, 23, 7)
    (rows,) = torch.autograd.grad(entries, x, outer, is_grads_batched=True)
    assert torch.equal(rows.view(161, 161).diagonal().view(23, 7), expected)
    assert rows.count_nonzero() == 161


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_pass_on_another_thread(generator, target, dtype):
    x = draw(generator, dtype)
    (expected,) = torch.autograd.grad(loss_of(x, target), x)
    loss = loss_of(x, target)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("kind", ["index", "dense", "weight", "regression"])
def test_peak_memory_is_one_gradient_and_the_scratch(monkeypatch, kind):
    """Four million logits: 1.1 times their 16 MB; 12 bytes an entry of a block, 16 for boxes."""
    monkeypatch.setattr(scratch, "_here", threading.local())
    x = torch.zeros(50000, 80, requires_grad=True)
    dense = torch.zeros(50000, 80)
    index = torch.zeros(50000, dtype=torch.int64)
    weight = torch.ones(50000, 1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if kind == "regression":
            loss = ghm_r_loss(x, dense)
        elif kind == "weight":
            loss = ghm_c_loss(x, index, weight, weighted=True)
        else:
            loss = ghm_c_loss(x, index if kind == "index" else dense)
        (loss * 2.0).backward()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    kept = (16 if kind == "regression" else 12) * blocks.block_entries()
    assert held >= 16_000_000  # the gradient is there
    assert peak <= 1.1 * 16_000_000 + kept + 1024
    if torch.get_num_threads() == 1 and kind != "regression":
        assert peak <= 1.25 * 16_000_000
