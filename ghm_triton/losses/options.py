"""Options that all losses share, the choice of the backend, and the steps of harmonized losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import environ
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ghm_triton import cpu
from ghm_triton.losses.density import GradientDensity
from ghm_triton.losses.inputs import require_choice
from ghm_triton.reference.density import weigh_entries
from ghm_triton.reference.interface import (
    ClassificationInputs,
    Kernels,
    RegionCounts,
    RegressionInputs,
    SoftmaxInputs,
)

Reduction = Literal["mean", "sum", "none"]
Average = Literal["valid", "positives"]

REDUCTIONS = ("mean", "sum", "none")
AVERAGES = ("valid", "positives")

Inputs = TypeVar("Inputs", ClassificationInputs, RegressionInputs, SoftmaxInputs)


@dataclass(eq=False, repr=False)
class LossOptions:
    """Options of a call, which every loss has.

    Raises:
        ValueError: `reduction`, `average` or `backend` is unknown.
    """

    loss_weight: float = 1.0
    average: Average = "valid"
    weighted: bool = False
    reduction: Reduction = "mean"
    backend: Backend = "auto"
    validate: bool | None = None

    def __post_init__(self) -> None:
        require_choice("reduction", self.reduction, REDUCTIONS)
        require_choice("average", self.average, AVERAGES)
        require_choice("backend", self.backend, BACKENDS)


class LossModule(nn.Module, LossOptions):
    """Base of the losses as modules: the options are attributes, which may be changed."""

    def __init__(self, options: LossOptions) -> None:
        nn.Module.__init__(self)
        vars(self).update(vars(options))


class HarmonizedLoss(LossModule):
    """Base of the losses with a gradient density.

    The state (`density.smoothed`, `density.updates`) is in the `state_dict`; it changes in training
    mode only.
    """

    def __init__(self, density: GradientDensity, options: LossOptions) -> None:
        super().__init__(options)
        self.density = density


def harmonized_loss(
    inputs: Inputs,
    values: Tensor,
    density: GradientDensity,
    options: LossOptions,
    kernels: Kernels,
    *,
    count: Callable[[Inputs, int], RegionCounts],
    loss: Callable[..., Tensor],
) -> Tensor:
    """Count the gradient norms, weigh the unit regions, and compute the weighted loss.

    Args:
        inputs: As rows.
        values: The predictions among them.
        density: Holds the moving average.
        options: Of the call.
        kernels: The implementation that `count` and `loss` belong to.
        count: Counts the inputs by unit region.
        loss: Computes the loss from the inputs, the weights and the scale of the sum.

    Raises:
        ValueError: The density is on another device than the inputs.
    """
    if density.smoothed.device != values.device:
        raise ValueError(
            f"the loss keeps its state on {density.smoothed.device}, the predictions are on"
            f" {values.device}: move the loss with .to({str(values.device)!r})"
        )
    weighted, mean = options.weighted, options.reduction == "mean"
    # Ranks average their gradients, so each rank's share of a mean is multiplied by their number.
    factor = options.loss_weight * (density.world_size() if mean else 1)
    with torch.no_grad():
        counts = density.gather(count(inputs, density.regions))
        if density.method == "exact" and not isinstance(inputs, SoftmaxInputs):
            strength, bound = density.current_strength(), density.max_weight
            inputs = weigh_entries(inputs, density.bins, strength, bound, weighted=weighted)
            weighted = True
        table, scale = density.weigh(counts, kernels, options.average if mean else None, factor)
    reduce = options.reduction != "none"
    result = loss(inputs, table, scale, weighted=weighted, reduce=reduce)
    return result if reduce else result.view(inputs.shape)


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
    if tensor.dtype.itemsize > 4 or not (tensor.is_cuda or environ.get("TRITON_INTERPRET") == "1"):
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
