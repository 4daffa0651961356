"""Which implementation runs: Triton's kernels, or plain torch."""

from __future__ import annotations

from torch import Tensor

from ghm_triton import cpu
from ghm_triton.losses.inputs import require_choice
from ghm_triton.ops.interpreter import interpreting
from ghm_triton.reference.interface import Kernels

BACKENDS = ("auto", "triton", "torch")


def select_backend(backend: str, tensor: Tensor) -> Kernels:
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


def _kernels(tensor: Tensor) -> Kernels:
    if tensor.dtype.itemsize > 4 or not (tensor.is_cuda or interpreting()):
        raise ValueError(
            f"backend='triton' cannot run on a {tensor.dtype} tensor on {tensor.device}: it takes"
            " float32, float16 and bfloat16 on a CUDA device (or anywhere with TRITON_INTERPRET=1);"
            " use backend='torch'"
        )
    try:
        from ghm_triton.ops import operators
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "backend='triton' needs the package triton, which is not installed", name="triton"
        ) from error
    if not (operators.INTERPRETED or (tensor.is_cuda and operators.COMPILED)):
        raise ValueError(
            "TRITON_INTERPRET=1 was set after Triton was imported: set it before Python starts"
        )
    return operators
