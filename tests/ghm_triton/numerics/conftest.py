"""What the losses return where arithmetic is hard: the README's table "In hard cases", and more.

Each row has a test of its name in a class `TestInHardCases`. What several processes make of a value
that is not finite is in `test_distributed.py`.
"""

import pytest
import torch

OUTER = 3.7  # what multiplies every loss before backward: 1 would hide a gradient that ignores it


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(17)


@pytest.fixture
def outer():
    return OUTER


@pytest.fixture
def call():
    """Loss and gradient, the module having been moved to the device."""

    def both(criterion, device, values, *given):
        x = values.detach().clone().to(device).requires_grad_()
        loss = criterion.to(device)(x, *(tensor.to(device) for tensor in given))
        (loss * OUTER).sum().backward()
        return loss.detach(), x.grad

    return both


@pytest.fixture
def state_of():
    """What a criterion has counted, as numbers that can be compared."""
    return lambda criterion: {
        key: value.tolist() for key, value in criterion.density.state_dict().items()
    }
