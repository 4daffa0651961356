"""Which implementation runs: Triton's kernels, or plain torch."""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

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
    runs_here = tensor.is_cuda or interpreting()
    fits = runs_here and tensor.dtype.itemsize <= 4
    if backend == "torch" or (backend == "auto" and not fits):
        from ghm_triton import reference

        return reference
    if not fits:
        what = f"a {tensor.dtype} tensor on {tensor.device}"
        raise ValueError(
            f"backend='triton' cannot run on {what}: it takes float32, float16 and bfloat16 on a"
            " CUDA device (or anywhere with TRITON_INTERPRET=1); use backend='torch'"
        )
    try:
        from ghm_triton import ops
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        if backend == "auto":
            from ghm_triton import reference

            return reference
        raise ModuleNotFoundError(
            "backend='triton' needs the package triton, which is not installed", name="triton"
        ) from error
    return ops
