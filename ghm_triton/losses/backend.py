"""Choice of the implementation: Triton kernels, or plain torch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ghm_triton import cpu
from ghm_triton.losses.inputs import require_choice
from ghm_triton.ops.interpreter import interpreting
from ghm_triton.reference.interface import Kernels

Backend = Literal["auto", "triton", "torch"]

BACKENDS = ("auto", "triton", "torch")


def select_backend(backend: str, tensor: Tensor) -> Kernels:
    """Choose the kernels for a tensor.

    Args:
        backend: `auto`: Triton for CUDA tensors or under its interpreter, torch elsewhere (and
            for float64, which the kernels do not support); `triton`; `torch`.
        tensor: The predictions.

    Raises:
        ValueError: The backend is unknown, or does not support this tensor.
        ModuleNotFoundError: `triton` was requested and is not installed.
    """
    require_choice("backend", backend, BACKENDS)
    if backend == "torch":
        return cpu
    try:
        return _triton(tensor)
    except (ValueError, ModuleNotFoundError) as obstacle:
        foreign = isinstance(obstacle, ModuleNotFoundError) and obstacle.name != "triton"
        if backend == "triton" or foreign:
            raise
        return cpu


def _triton(tensor: Tensor) -> Kernels:
    if tensor.dtype.itemsize > 4 or not (tensor.is_cuda or interpreting()):
        raise ValueError(
            f"backend='triton' cannot run on a {tensor.dtype} tensor on {tensor.device}: it takes"
            " float32, float16 and bfloat16 on a CUDA device (or anywhere with TRITON_INTERPRET=1);"
            " use backend='torch'"
        )
    try:
        from ghm_triton.ops import backend as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "backend='triton' needs the package triton, which is not installed", name="triton"
        ) from error
    if not (kernels.INTERPRETED or (tensor.is_cuda and kernels.COMPILED)):
        raise ValueError(
            "TRITON_INTERPRET=1 was set after Triton was imported: set it before Python starts"
        )
    return kernels
