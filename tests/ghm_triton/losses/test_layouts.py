"""How rows lie in memory and how they are cut into tiles changes no result.

The kernels are told how rows are aligned, and the narrower tiles fit, the narrower they are; what
is contiguous is even viewed in other columns. The truth is torch's, on contiguous copies.
"""

import math

import pytest
import torch

from ghm_triton import focal_loss, ghm_c_loss, ghm_r_loss, ghm_softmax_loss

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("kernels_run")]

CLASSES = [1, 2, 3, 5, 16, 17, 20, 80, 91]
ALIGNMENTS = [1, 2, 4, 8, 16]
ROWS = 19
LOSSES = {
    "ghm_c index": (ghm_c_loss, {"strength": 1.0}),
    "ghm_c dense": (ghm_c_loss, {"strength": 1.0, "weighted": True}),
    "ghm_r": (ghm_r_loss, {"strength": 1.0, "weighted": True}),
    "focal index": (focal_loss, {}),
    "focal dense": (focal_loss, {"gamma": 1.5, "weighted": True}),
    "softmax index": (ghm_softmax_loss, {"strength": 1.0, "weighted": True}),
}


def draw(paper, name, shape, seed=0):
    """Logits or predictions, targets, and weights where the loss has any."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(0, 3, shape, generator=generator) / 2
    if name == "ghm_r":
        target = torch.randn(shape, generator=generator)
        return paper.draw_pred(target, torch.float32, 10, 0.02, generator), target, weight
    if name == "softmax index":
        index = torch.randint(-1, shape[1], shape[:1], generator=generator)
        logits = paper.draw_rows(shape, index, torch.float32, 30, generator)
        return logits, index, weight[:, 0]
    target = torch.rand(shape, generator=generator)
    if name.endswith("index"):
        target, weight = torch.randint(-1, shape[1] + 1, shape[:1], generator=generator), None
    return paper.draw_logits(shape, target, torch.float32, 30, generator), target, weight


def laid_out(tensor, alignment, offset=0):
    """A copy within NaN, whose row stride has `alignment` for its greatest divisor within 16."""
    if tensor is None or tensor.dim() < 2:
        return tensor
    width = next(
        width for width in range(tensor.shape[1] + offset, 200) if math.gcd(width, 16) == alignment
    )
    wider = torch.full((tensor.shape[0], width), torch.nan, device=tensor.device)
    wider[:, offset : offset + tensor.shape[1]] = tensor
    return wider[:, offset : offset + tensor.shape[1]]


def results(name, backend, reduction, x, *given):
    """Loss and gradient."""
    loss_function, options = LOSSES[name]
    x = x.detach().requires_grad_()
    loss = loss_function(x, *given, reduction=reduction, backend=backend, **options)
    (slope,) = torch.autograd.grad(loss.sum() * 3.7, x)
    return loss.detach().cpu().contiguous(), slope.cpu().contiguous()


def check(device, name, reduction, alike, x, *given):
    """Triton with these tensors, torch with contiguous ones that are `alike`."""
    given = [None if tensor is None else tensor.to(device) for tensor in given]
    ours = results(name, "triton", reduction, x, *given)
    truth = results(name, "torch", reduction, *alike)
    # Both are float32; the accuracy of the entries is tested against float64.
    torch.testing.assert_close(ours, truth, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_of_any_alignment(paper, device, classes, alignment):
    # Not every loss with every layout: they share what is at stake here, and take turns.
    row, column = CLASSES.index(classes), ALIGNMENTS.index(alignment)
    name = list(LOSSES)[(row + column) % len(LOSSES)]
    drawn = draw(paper, name, (ROWS, classes), seed=row)
    x, *given = (None if tensor is None else tensor.to(device) for tensor in drawn)
    # Targets and weights of other alignments than the logits.
    others = (ALIGNMENTS[(row + k) % 5] for k in (2, 3))
    given = [laid_out(tensor, next(others)) for tensor in given]
    x = laid_out(x, alignment, offset=row % 2)
    assert math.gcd(x.stride(0), 16) == alignment
    check(device, name, ["none", "sum"][column % 2], drawn, x, *given)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(16, 5), (33, 16), (48, 1)])
def test_contiguous_entries_that_rows_of_16_hold(paper, device, name, shape):
    x, target, weight = draw(paper, name, shape)
    assert x.numel() % 16 == 0
    check(device, name, "none", (x, target, weight), x.to(device), target, weight)
    # Not if what lies beside is not contiguous: then all keep their rows.
    if weight is not None and weight.dim() == 2:
        kept = weight[:1].expand(shape)
        alike = (x, target, kept.contiguous())
        spread = laid_out(target, 1, offset=1)
        check(device, name, "none", alike, x.to(device), spread, kept)
