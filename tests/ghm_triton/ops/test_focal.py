"""What only the focal kernel can get wrong; arithmetic is tested beside `reference`."""

import pytest
import torch

from ghm_triton import focal_loss, reference
from ghm_triton.losses.inputs import classification_inputs

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]


def draw(kind, shape):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(shape, generator=generator) * 4
    if kind == "index":
        return logits, torch.randint(-1, shape[1] + 1, shape[:1], generator=generator)
    return logits, torch.rand(shape, generator=generator)


@pytest.mark.parametrize("kind", ["index", "soft"])
@pytest.mark.parametrize("shape", [(9000, 1), (150, 37), (3, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_poisoned_memory_and_programs_that_walk(
    device, poisoned, two_programs, kind, shape, reduction
):
    logits, target = draw(kind, shape)
    results = []
    for backend, where in (("torch", torch.device("cpu")), ("triton", device)):
        x = logits.to(where).detach().requires_grad_()
        loss = focal_loss(x, target.to(where), reduction=reduction, backend=backend)
        (loss * 3.3).sum().backward()
        results.append((loss.detach().cpu(), x.grad.cpu()))
    # Both are float32; the entries' own accuracy is tested against float64.
    for ours, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_has_the_layout_of_the_logits(device):
    logits = torch.randn(6, 40, device=device).t().requires_grad_()
    focal_loss(logits, torch.zeros(40, 6, device=device), backend="triton").backward()
    assert logits.grad.stride() == logits.stride()


@pytest.mark.parametrize("kind", ["index", "soft"])
def test_a_gradient_that_comes_in_with_strides(device, kind):
    logits, target = draw(kind, (41, 6))
    outer = torch.randn(6, 41).t()
    slopes = []
    for kernels, where in ((reference, torch.device("cpu")), (None, device)):
        if kernels is None:
            from ghm_triton.ops import backend as kernels
        x = logits.to(where).detach().requires_grad_()
        inputs = classification_inputs(x, target.to(where), None, None)
        options = {"alpha": 0.3, "gamma": 1.5, "weighted": False, "reduce": False}
        loss = kernels.weighted_focal(inputs, torch.tensor(0.7, device=where), **options)
        loss.backward(outer.to(where))
        slopes.append(x.grad.cpu())
    # Soft targets: the two slopes cancel.
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-6)


def test_it_refuses_a_second_derivative(device):
    x = torch.randn(3, 2, device=device, requires_grad=True)
    outer = torch.ones((), device=device, requires_grad=True)
    loss = focal_loss(x, torch.zeros(3, 2, device=device), backend="triton") * outer
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(device, dtype):
    x = torch.randn(30, 5, device=device).to(dtype).requires_grad_()
    loss = focal_loss(x, torch.zeros(30, 5, device=device), backend="triton") * 3
    once = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    again = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    last = torch.autograd.grad(loss, x)[0]
    assert once.any()
    assert torch.equal(once, again)
    assert torch.equal(once, last)
