"""The losses inside `torch.compile` and `torch.export`: one graph, the same numbers."""

import copy

import pytest
import torch

from ghm_triton import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss

OUTER = 3.7
LOSSES = {
    "ghm_c": lambda backend: GHMCLoss(strength=1.0, backend=backend),
    "ghm_c dense": lambda backend: GHMCLoss(average="positives", backend=backend),
    "ghm_c entries": lambda backend: GHMCLoss(reduction="none", weighted=True, backend=backend),
    "ghm_c streaming": lambda backend: GHMCLoss(bins=4, density="streaming", backend=backend),
    "ghm_c exact": lambda backend: GHMCLoss(bins=4, density="exact", backend=backend),
    "ghm_r": lambda backend: GHMRLoss(backend=backend),
    "focal": lambda backend: FocalLoss(backend=backend),
    "softmax": lambda backend: GHMSoftmaxLoss(strength=1.0, backend=backend),
}


def draw(name, device, rows=40):
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, 5, generator=generator) * 2
    target = torch.rand(rows, 5, generator=generator)
    if name == "softmax":
        target = torch.randint(-1, 5, (rows,), generator=generator)
    if name in ("ghm_c", "ghm_c exact", "focal"):
        target = torch.randint(-1, 6, (rows,), generator=generator)
    return logits.to(device), target.to(device)


def step(criterion, logits, target):
    x = logits.clone().requires_grad_()
    loss = criterion(x, target)
    (loss * OUTER).sum().backward()
    return loss.detach(), x.grad


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_and_the_same_numbers(device, backend, name):
    torch.compiler.reset()
    eager = LOSSES[name](backend).to(device)
    whole = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for rows in (40, 40, 57):  # the last with shapes that were not compiled for
        expected = step(eager, *draw(name, device, rows))
        for ours, theirs in zip(step(whole, *draw(name, device, rows)), expected, strict=True):
            # The same arithmetic; torch's own path may sum in another order once it is traced.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    if name != "focal":
        ours, theirs = (dict(module.named_buffers()) for module in (whole, eager))
        assert int(eager.density.updates) == 3
        for (_, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ghm_c", "ghm_c dense", "ghm_r", "focal", "softmax"])
def test_the_exported_program_computes_the_loss(device, backend, name):
    logits, target = draw(name, device)
    criterion = LOSSES[name](backend).to(device)
    program = torch.export.export(copy.deepcopy(criterion), (logits, target))
    exported = program.module()
    for _ in range(2):  # the moving average goes along
        torch.testing.assert_close(exported(logits, target), criterion(logits, target))


def test_an_index_above_the_classes_makes_the_compiled_loss_nan(device, backend):
    """Eager on a CPU it is an error; a graph cannot stop for a value."""
    torch.compiler.reset()
    criterion = GHMCLoss(backend=backend).to(device)
    whole = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    loss = whole(torch.zeros(4, 3, device=device), torch.tensor([0, 1, 4, 3], device=device))
    assert loss.isnan()
    assert int(criterion.density.updates) == 0
