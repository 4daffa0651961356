"""Parametrizes the tests of `tester.py`, and spoils the memory that kernels find."""

import pytest
import torch

OUTER = 3.7  # as in `tester.py`

pytest.register_assert_rewrite("tests.ghm_triton.losses.tester")


def pytest_generate_tests(metafunc):
    """A parameter that the class names in `cases` takes each of those values.

    Unless the test says itself what it takes.
    """
    named = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    named = {name for names in named for name in ([names] if isinstance(names, str) else names)}
    for name, values in getattr(metafunc.cls, "cases", {}).items():
        if name in metafunc.fixturenames and name not in named:
            metafunc.parametrize(name, values, ids=_id)


def pytest_collection_modifyitems(config, items):
    """Drop tests of kernels that the class does not name in `kernel_tests`."""
    dropped = [
        item
        for item in items
        if (named := getattr(getattr(item, "cls", None), "kernel_tests", None)) is not None
        and item.get_closest_marker("kernels")
        and item.originalname not in named
    ]
    gone = set(dropped)
    items[:] = [item for item in items if item not in gone]
    if dropped:
        config.hook.pytest_deselected(items=dropped)


def _id(value):
    return value.__name__ if hasattr(value, "__name__") else str(value)[:40]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def call(device):
    """Loss and gradient of a module, which is moved to the device; `OUTER` multiplies the loss."""

    def both(criterion, values, *given):
        x = values.detach().clone().to(device).requires_grad_()
        loss = criterion.to(device)(x, *(tensor.to(device) for tensor in given))
        (loss * OUTER).sum().backward()
        return loss.detach(), x.grad

    return both
