import threading

import pytest
import torch

from ghm_triton.cpu import blocks

SMALL = 45  # odd, so that pairs of entries meet the end of a block; no multiple of a vector


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few entries, so that small batches have many."""
    monkeypatch.setattr(blocks, "block_entries", lambda: SMALL)
    monkeypatch.setattr("ghm_triton.cpu.softmax.block_entries", lambda: SMALL)
    monkeypatch.setattr(blocks, "_local", threading.local())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)
