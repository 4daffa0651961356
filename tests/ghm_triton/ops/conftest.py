"""Poisoned scratch memory, and a walk over many tiles, for tests of the kernels."""

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever the launchers allocate is full of NaN, or of a sentinel, before a kernel writes."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -999)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))


@pytest.fixture
def two_programs(monkeypatch):
    """Kernels that walk do it with two programs, so that each meets several tiles."""
    # The launcher first: it copies the constant, and sizes its buffers by it, when it is imported.
    from ghm_triton.ops import launch, tiles

    assert launch.MAX_PROGRAMS > 2
    monkeypatch.setattr(tiles, "MAX_PROGRAMS", 2)
