import subprocess
import sys

import pytest

import ghm_triton


def test_every_public_name_is_there():
    for name in ghm_triton.__all__:
        assert getattr(ghm_triton, name).__name__ == name
    assert set(ghm_triton.__all__) <= set(dir(ghm_triton))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'GHMDLoss'"):
        _ = ghm_triton.GHMDLoss


def test_the_losses_need_neither_torchvision_nor_triton():
    code = """
import sys
for name in ("torchvision", "triton", "sklearn", "PIL", "matplotlib"):
    sys.modules[name] = None
import torch, ghm_triton
loss = ghm_triton.GHMCLoss()(torch.randn(4, 3), torch.tensor([0, 1, 3, 3]))
assert bool(torch.isfinite(loss)), loss
assert ghm_triton.OHEM(2)(torch.rand(1, 5)).sum() == 2
assert ghm_triton.GuidedLoss()(loss, loss) == 2 * loss
"""
    subprocess.run([sys.executable, "-c", code], check=True)
