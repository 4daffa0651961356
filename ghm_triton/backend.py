"""Which implementation runs: Triton's kernels, or plain torch."""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from ghm_triton import cpu
from ghm_triton._inputs import require_choice

BACKENDS = ("auto", "triton", "torch")


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def select_backend(backend: str, tensor: Tensor) -> ModuleType:
    """The module with the kernels for `tensor`.

    Args:
        backend: `auto`: Triton for CUDA tensors or under its interpreter, torch elsewhere (and
            for float64, which the kernels do not take); `triton`; `torch`.
        tensor: What will be computed on.

    Raises:
        ValueError: The backend is unknown, or cannot take this tensor.
        ModuleNotFoundError: `triton` was asked for and is not installed.
    """
    require_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return cpu
    try:
        return _kernels(tensor)
    except (ValueError, ModuleNotFoundError) as obstacle:
        foreign = isinstance(obstacle, ModuleNotFoundError) and obstacle.name != "triton"
        if backend == "triton" or foreign:
            raise
        return cpu


def _kernels(tensor: Tensor) -> ModuleType:
    if tensor.dtype.itemsize > 4 or not (tensor.is_cuda or interpreting()):
        raise ValueError(
            f"backend='triton' cannot run on a {tensor.dtype} tensor on {tensor.device}: it takes"
            " float32, float16 and bfloat16 on a CUDA device (or anywhere with TRITON_INTERPRET=1);"
            " use backend='torch'"
        )
    try:
        from ghm_triton import ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "backend='triton' needs the package triton, which is not installed", name="triton"
        ) from error
    if not (ops.INTERPRETED or (tensor.is_cuda and ops.COMPILED)):
        raise ValueError(
            "TRITON_INTERPRET=1 was set after Triton was imported: set it before Python starts"
        )
    return ops
