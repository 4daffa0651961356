"""Where the kernels run, and the float64 truth that everything is compared with."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETING
NO_KERNELS = (
    "Triton needs a CUDA device, or its interpreter in a process of its own:"
    " TRITON_INTERPRET=1 python -m pytest -m kernels tests/ghm_triton"
)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, unless the kernels are interpreted."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def kernels_run() -> None:
    """For a test that runs kernels: skip, with how to run it, where they cannot."""
    if not (ON_GPU or INTERPRETING):
        pytest.skip(NO_KERNELS)


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def backend(request: pytest.FixtureRequest) -> str:
    """Either implementation, by its public name."""
    if request.param == "triton":
        request.getfixturevalue("kernels_run")
    return request.param


@pytest.fixture
def kernels(backend: str) -> ModuleType:
    """Either implementation, as its module."""
    from ghm_triton import cpu

    if backend == "torch":
        return cpu
    from ghm_triton.ops import backend as ops

    return ops


@pytest.fixture(scope="session")
def paper() -> ModuleType:
    """The formulas of the papers and of the released code, in numpy's float64."""
    path = Path(__file__).with_name("paper.py")
    spec = importlib.util.spec_from_file_location("paper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def poisoned(monkeypatch):
    """Tensors that launchers allocate are full of NaN, or a sentinel, before kernels write."""
    empty, empty_like = torch.empty, torch.empty_like

    def spoil(tensor):
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -999)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: spoil(empty_like(*a, **k)))


@pytest.fixture
def two_programs(monkeypatch, kernels_run):
    """Two programs walk over all tiles, so that each sees several."""
    from ghm_triton.ops import launch

    monkeypatch.setattr(launch, "MAX_PROGRAMS", 2)
