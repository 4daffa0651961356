"""Which implementation runs."""

import os
import subprocess
import sys

import pytest
import torch

from ghm_triton import cpu
from ghm_triton.losses.options import select_backend


@pytest.fixture
def compiling(monkeypatch):
    """As without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_on_the_cpu_it_is_torch(compiling):
    assert select_backend("auto", torch.zeros(1)) is cpu
    assert select_backend("torch", torch.zeros(1)) is cpu


def test_asking_for_triton_on_the_cpu_says_what_is_missing(compiling):
    with pytest.raises(ValueError, match=r"cannot run on a torch.float32 tensor on cpu: it takes"):
        select_backend("triton", torch.zeros(1))


@pytest.mark.kernels
def test_where_kernels_run_it_is_triton(kernels_run, device):
    from ghm_triton.ops import backend as ops

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert select_backend("auto", torch.zeros(1, dtype=dtype, device=device)) is ops
        assert select_backend("triton", torch.zeros(1, dtype=dtype, device=device)) is ops
    double = torch.zeros(1, dtype=torch.float64, device=device)
    assert select_backend("auto", double) is cpu
    with pytest.raises(ValueError, match=r"torch.float64 tensor"):
        select_backend("triton", double)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch; got 'cuda'"):
        select_backend("cuda", torch.zeros(1))


def run(script):
    """What a script prints in a Python of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton():
    printed = run("""
import os, sys, torch
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["triton"] = None  # importing it fails
from ghm_triton import ghm_c_loss
x = torch.zeros(2, 3)
assert ghm_c_loss(x, x) > 0
try:
    ghm_c_loss(x, x, backend="triton")
except ModuleNotFoundError as error:
    print(error)
""")
    assert printed == "backend='triton' needs the package triton, which is not installed\n"


def test_another_module_that_is_missing_is_not_hidden():
    printed = run("""
import os, sys, torch
os.environ["TRITON_INTERPRET"] = "1"
from ghm_triton import ghm_c_loss
sys.modules["ghm_triton.ops.bce"] = None
x = torch.zeros(2, 3)
try:
    ghm_c_loss(x, x)
except ModuleNotFoundError as error:
    print(error.name)
""")
    assert printed == "ghm_triton.ops.bce\n"


def test_setting_the_interpreter_too_late_is_said():
    printed = run("""
import os, torch, triton
from ghm_triton import ghm_c_loss
os.environ["TRITON_INTERPRET"] = "1"
x = torch.zeros(2, 3)
assert ghm_c_loss(x, x) > 0
try:
    ghm_c_loss(x, x, backend="triton")
except ValueError as error:
    print(error)
""")
    assert printed.startswith("TRITON_INTERPRET=1 was set after Triton was imported")
