"""`GHMC` and `GHMR` of MMDetection, with its signatures and its numbers, on this package's kernels.

In a configuration, one line puts them in the place of MMDetection's own:

    custom_imports = dict(imports=["ghm_triton.integrations.mmdet"])

Importing this module registers both, over the classes of the same name (MMDetection 3.x:
`mmdet.registry.MODELS`; 2.x: `mmdet.models.builder.LOSSES`). Without MMDetection it registers
nothing, and the classes work as they are.

What they keep of the released algorithm: weights `tot / S_j / n` over the `n` occupied regions; an
average that starts at 0, is not corrected and moves in occupied regions only; `label_weight` that
selects and does not multiply; `avg_factor` that is ignored. Where they differ, on purpose:

- the average moves in training mode only, and a batch with a non-finite entry leaves it alone;
- `reduction="sum"` is the sum of the entries, where MMDetection raises;
- no matrix of one-hot labels, no wait for the device, float32 arithmetic under float16 logits.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ghm_triton.losses import ghm_c_loss, ghm_r_loss
from ghm_triton.losses.backend import BACKENDS
from ghm_triton.losses.density import GradientDensity
from ghm_triton.losses.inputs import require_choice
from ghm_triton.losses.options import (
    Average,
    Backend,
    Reduction,
    require_reduction,
)
from ghm_triton.losses.schedule import StrengthSchedule


class _Released(nn.Module):
    """What the two losses share: the average, the reduction of a call, MMDetection's state."""

    def __init__(
        self,
        density: GradientDensity,
        loss_weight: float,
        reduction: Reduction,
        average: Average,
        backend: Backend,
        validate: bool | None,
    ) -> None:
        super().__init__()
        require_reduction(reduction, average)
        require_choice("backend", backend, BACKENDS)
        self.density = density
        self.loss_weight = loss_weight
        self.reduction: Reduction = reduction
        self.average: Average = average
        self.backend: Backend = backend
        self.validate = validate
        self.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _adopt_released_state
        )

    def _reduction(self, override: Reduction | None) -> Reduction:
        return self.reduction if override is None else override


class GHMC(_Released):
    """MMDetection's `GHMC`: GHM-C as released (arXiv 1811.05181), one call a pyramid level.

    The keyword-only arguments are not MMDetection's; with their defaults the numbers are.
    `strength=0.25, ema="debiased", average="positives"` is what this package recommends instead.

    Args:
        bins: Unit regions `M`.
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps none.
        use_sigmoid: Must be True, as there: the loss is a binary cross entropy.
        loss_weight: Multiplies the loss.
        reduction: `mean` divides by the valid entries; `none`; `sum`.
        strength: As in `ghm_triton.GHMCLoss`.
        ema: As in `ghm_triton.GHMCLoss`.
        normalizer: As in `ghm_triton.GHMCLoss`.
        average: As in `ghm_triton.GHMCLoss`.
        max_weight: As in `ghm_triton.GHMCLoss`.
        backend: As in `ghm_triton.GHMCLoss`.
        validate: As in `ghm_triton.GHMCLoss`.

    Raises:
        NotImplementedError: `use_sigmoid` is False.
        ValueError: An option does not fit.
    """

    def __init__(
        self,
        bins: int = 10,
        momentum: float = 0,
        use_sigmoid: bool = True,
        loss_weight: float = 1.0,
        reduction: Reduction = "mean",
        *,
        strength: float | StrengthSchedule = 1.0,
        ema: str = "mmdet",
        normalizer: str = "valid_bins",
        average: Average = "valid",
        max_weight: float | None = None,
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        if not use_sigmoid:
            raise NotImplementedError("GHMC is a binary cross entropy: use_sigmoid must be True")
        density = GradientDensity(bins, momentum, strength, normalizer, ema, max_weight)
        super().__init__(density, loss_weight, reduction, average, backend, validate)
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None,
        reduction_override: Reduction | None = None,
        **kwargs: Any,  # noqa: ARG002  (avg_factor and others, which MMDetection ignores too)
    ) -> Tensor:
        """The loss of one pyramid level.

        Args:
            pred: Logits `[N, C]`, float32, float16 or bfloat16.
            target: Binary `[N, C]` of any dtype; or class indices `[N]`, where everything outside
                `0..C-1`, a negative index too, is background (MMDetection ignores by weight).
            label_weight: The shape of `target`; 0 ignores an entry, any positive value keeps it.
                None keeps all.
            reduction_override: In place of `reduction`, for this call.
            **kwargs: `avg_factor` and what else a head passes; not looked at.

        Returns:
            float32 scalar; `[N, C]`, weighted and not divided, for `none`.

        Raises:
            TypeError: A dtype does not fit.
            ValueError: A shape, device, option or (on the CPU) value does not fit.
        """
        reduction = self._reduction(reduction_override)
        if pred.dim() != target.dim():
            target = _background_outside(target, pred.shape[-1])
            label_weight = _by_row(label_weight, target)
        elif not (target.is_floating_point() or target.dtype == torch.bool):
            target = target.float()
        return ghm_c_loss(
            pred,
            target,
            label_weight,
            average=self.average,
            loss_weight=self.loss_weight,
            reduction=reduction,
            state=self.density,
            backend=self.backend,
            validate=self.validate,
        )


class GHMR(_Released):
    """MMDetection's `GHMR`: GHM-R as released (arXiv 1811.05181), one call a pyramid level.

    The keyword-only arguments are not MMDetection's; with their defaults the numbers are.

    Args:
        mu: Width of the quadratic part of ASL1, positive.
        bins: Unit regions `M`.
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps none.
        loss_weight: Multiplies the loss; the released configuration uses 10.
        reduction: `mean` divides by the sum of the weights, which cancels; `none`; `sum`.
        strength: As in `ghm_triton.GHMRLoss`.
        ema: As in `ghm_triton.GHMRLoss`.
        normalizer: As in `ghm_triton.GHMRLoss`.
        max_weight: As in `ghm_triton.GHMRLoss`.
        backend: As in `ghm_triton.GHMRLoss`.
        validate: As in `ghm_triton.GHMRLoss`.

    Raises:
        ValueError: An option does not fit.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0,
        loss_weight: float = 1.0,
        reduction: Reduction = "mean",
        *,
        strength: float | StrengthSchedule = 1.0,
        ema: str = "mmdet",
        normalizer: str = "valid_bins",
        max_weight: float | None = None,
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        if not mu > 0:
            raise ValueError(f"mu must be positive, got {mu}")
        density = GradientDensity(bins, momentum, strength, normalizer, ema, max_weight)
        super().__init__(density, loss_weight, reduction, "valid", backend, validate)
        self.mu = mu

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None,
        avg_factor: float | None = None,  # noqa: ARG002  (MMDetection ignores it too)
        reduction_override: Reduction | None = None,
    ) -> Tensor:
        """The loss of one pyramid level.

        Args:
            pred: Box deltas `[N, 4]` or `[N, 4 * C]`, floating.
            target: The same shape.
            label_weight: The same shape; 0 ignores an entry, any positive value keeps it. None
                keeps all.
            avg_factor: Not looked at.
            reduction_override: In place of `reduction`, for this call.

        Returns:
            float32 scalar; the shape of `pred`, weighted and not divided, for `none`.

        Raises:
            TypeError: A dtype does not fit.
            ValueError: A shape, device, option or (on the CPU) value does not fit.
        """
        reduction = self._reduction(reduction_override)
        loss = ghm_r_loss(
            pred,
            target,
            label_weight,
            mu=self.mu,
            loss_weight=self.loss_weight,
            reduction=reduction,
            state=self.density,
            backend=self.backend,
            validate=self.validate,
        )
        if reduction == "mean" or label_weight is None:
            return loss
        # As released, `tot` is the sum of the weights, not the number of entries they keep.
        weight = label_weight.detach()
        entries = (weight > 0).sum().clamp(min=1)
        return loss * (weight.sum(dtype=torch.float32).clamp(min=1) / entries)


def register() -> bool:
    """Put `GHMC` and `GHMR` into MMDetection's registry, in the place of its own.

    Importing this module does it; calling it again does no harm.

    Returns:
        Whether MMDetection is installed.

    Raises:
        ImportError: MMDetection is installed and does not import.
    """
    if find_spec("mmdet") is None:
        return False
    # MMDetection registers its own without `force`, so those must be there first.
    import_module("mmdet.models.losses")
    registry = _registry()
    for loss in (GHMC, GHMR):
        registry.register_module(name=loss.__name__, module=loss, force=True)
    return True


def _registry() -> Any:
    try:
        return import_module("mmdet.registry").MODELS
    except ModuleNotFoundError:
        return import_module("mmdet.models.builder").LOSSES  # MMDetection 2.x


def _background_outside(index: Tensor, classes: int) -> Tensor:
    return torch.where((index < 0) | (index > classes), classes, index)


def _by_row(label_weight: Tensor | None, index: Tensor) -> Tensor | None:
    if label_weight is None:
        return None
    if label_weight.numel() != index.numel():
        raise ValueError(
            f"label_weight {list(label_weight.shape)} must have one value a class index,"
            f" {list(index.shape)}"
        )
    return label_weight.reshape(*index.shape, 1)


def _adopt_released_state(
    module: _Released, state: dict[str, Any], prefix: str, *_unused: object
) -> None:
    """Read a checkpoint of MMDetection's own loss: `acc_sum` is the average, `edges` is fixed."""
    if state.pop(f"{prefix}edges", None) is None:
        return
    density = module.density
    smoothed = state.pop(f"{prefix}acc_sum", density.smoothed)
    state[f"{prefix}density.smoothed"] = smoothed
    # Theirs does not count updates. Ours then stand where `1 - a^t` is 1: nothing left to correct.
    settled = math.ceil(math.log(1e-7) / math.log(density.momentum)) if density.momentum else 1
    state[f"{prefix}density.updates"] = torch.full_like(density.updates, settled)


register()
