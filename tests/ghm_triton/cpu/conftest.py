import threading

import pytest
import torch

from ghm_triton.cpu import blocks, scratch

SMALL = 45  # odd, so that pairs of entries meet the end of a block; no multiple of a vector


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few entries: what takes a large batch elsewhere takes a small one here."""
    monkeypatch.setattr(blocks, "block_entries", lambda: SMALL)
    monkeypatch.setattr(scratch, "block_entries", lambda: SMALL)
    monkeypatch.setattr(scratch, "_here", threading.local())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)
