"""What only the cross-entropy kernels can get wrong; arithmetic is tested beside `reference`."""

import pytest
import torch

from ghm_triton import ghm_c_loss, reference
from ghm_triton.losses.inputs import classification_inputs

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


def draw(paper, kind, shape):
    generator = torch.Generator().manual_seed(8)
    target = torch.rand(shape, generator=generator)
    if kind == "index":
        target = torch.randint(-1, shape[1] + 1, shape[:1], generator=generator)
    return paper.draw_logits(shape, target, torch.float32, 30, generator), target


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("shape", [(9000, 1), (300, 37), (3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_poisoned_memory_and_programs_that_walk(
    paper, device, poisoned, two_programs, kind, shape, reduction
):
    logits, target = draw(paper, kind, shape)
    results = []
    for backend, where in (("torch", torch.device("cpu")), ("triton", device)):
        x = logits.to(where).detach().requires_grad_()
        loss = ghm_c_loss(x, target.to(where), reduction=reduction, backend=backend, strength=1.0)
        (loss * 3.3).sum().backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    # Both are float32; the entries' own accuracy is tested against float64.
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_has_the_layout_of_the_logits(device):
    logits = torch.randn(6, 40, device=device).t().requires_grad_()
    ghm_c_loss(logits, torch.zeros(40, 6, device=device), backend="triton").backward()
    assert logits.grad.stride() == logits.stride()


def test_a_gradient_that_comes_in_with_strides(paper, device):
    logits, target = draw(paper, "soft", (41, 6))
    outer = torch.randn(6, 41).t()
    slopes = []
    for kernels, where in ((reference, torch.device("cpu")), (None, device)):
        if kernels is None:
            from ghm_triton.ops import backend as kernels
        x = logits.to(where).detach().requires_grad_()
        inputs = classification_inputs(x, target.to(where), None, None)
        table = torch.rand(4, generator=torch.Generator().manual_seed(9)).to(where)
        loss = kernels.weighted_bce(inputs, table, table[0], weighted=False, reduce=False)
        loss.backward(outer.to(where))
        slopes.append(x.grad.cpu())
    torch.testing.assert_close(slopes[1], slopes[0])


def test_it_refuses_a_second_derivative(device):
    x = torch.zeros(3, 2, device=device, requires_grad=True)
    outer = torch.ones((), device=device, requires_grad=True)
    loss = ghm_c_loss(x, torch.zeros(3, 2, device=device), backend="triton") * outer
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_logits_changed_before_backward_are_noticed(device):
    x = torch.zeros(3, 2, device=device, requires_grad=True)
    y = x * 1
    options = {"backend": "triton", "reduction": "none"}
    loss = ghm_c_loss(y, torch.zeros(3, 2, device=device), **options)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_logits_changed_before_backward_matter_no_more_once_the_gradient_is_formed(device):
    x = torch.zeros(3, 2, device=device, requires_grad=True)
    y = x * 1
    loss = ghm_c_loss(y, torch.zeros(3, 2, device=device), backend="triton", strength=0.0)
    y.add_(1)
    loss.backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.5 / 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(device, dtype):
    x = torch.randn(30, 5, device=device).to(dtype).requires_grad_()
    loss = ghm_c_loss(x, torch.zeros(30, 5, device=device), backend="triton") * 3
    once = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    last = torch.autograd.grad(loss, x)[0]
    assert once.any()
    assert torch.equal(once, again)
    assert torch.equal(once, last)


def test_two_losses_on_the_same_logits_add_up(device):
    x = torch.randn(30, 5, device=device, requires_grad=True)
    target = torch.zeros(30, 5, device=device)
    one, two = (ghm_c_loss(x, target, backend="triton", strength=s) for s in (0.0, 1.0))
    (whole,) = torch.autograd.grad(one + 2 * two, x)
    one, two = (ghm_c_loss(x, target, backend="triton", strength=s) for s in (0.0, 1.0))
    parts = torch.autograd.grad(one, x)[0] + 2 * torch.autograd.grad(two, x)[0]
    # The same products, added in another order.
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-9)
