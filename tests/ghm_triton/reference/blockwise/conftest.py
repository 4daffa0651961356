import pytest
import torch

from ghm_triton.reference.blockwise import blocks

# Odd, so that pairs of entries meet the end of a block; no multiple of a vector.
SMALL = 45


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of few entries: what takes a large batch elsewhere takes a small one here."""
    monkeypatch.setattr(blocks, "BLOCK", SMALL)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)
