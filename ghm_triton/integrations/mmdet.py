"""Drop-in replacements for `GHMC` and `GHMR` of MMDetection.

They have MMDetection's signatures and numbers. In a configuration, one line replaces the originals:

    custom_imports = dict(imports=["ghm_triton.integrations.mmdet"])

Importing this module registers both over the classes of the same name (MMDetection 3.x:
`mmdet.registry.MODELS`; 2.x: `mmdet.models.builder.LOSSES`). Without MMDetection it registers
nothing, and the classes can be used directly.

The released algorithm is kept: weights `tot / S_j / n` over the `n` occupied regions; an average
that starts at 0, is not corrected and moves in occupied regions only; `label_weight` that selects
and does not multiply; `avg_factor` that is ignored. The differences are deliberate:

- the average changes in training mode only, and a batch with a non-finite entry does not change it;
- `reduction="sum"` is the sum of the entries, where MMDetection raises;
- `label_weight` may be left out, so that heads that do not pass it (FCOS, YOLOX, SSD) work;
- no matrix of one-hot labels, no synchronisation with the device, float32 arithmetic for float16
  logits.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ghm_triton.losses import ghm_c_loss, ghm_r_loss
from ghm_triton.losses.density import GradientDensity
from ghm_triton.losses.ghm_r import require_mu
from ghm_triton.losses.options import Average, Backend, HarmonizedLoss, LossOptions, Reduction
from ghm_triton.losses.schedule import StrengthSchedule


class _Released(HarmonizedLoss):
    """Base of the two losses: reads checkpoints of MMDetection's own."""

    def __init__(self, density: GradientDensity, options: LossOptions) -> None:
        super().__init__(density, options)
        self.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _adopt_released_state
        )

    def _options(self, reduction_override: Reduction | None) -> dict[str, Any]:
        return {
            "loss_weight": self.loss_weight,
            "reduction": reduction_override or self.reduction,
            "state": self.density,
            "backend": self.backend,
            "validate": self.validate,
        }


class GHMC(_Released):
    """MMDetection's `GHMC`: GHM-C as released (arXiv 1811.05181), one call per pyramid level.

    The keyword-only arguments are additions; with their defaults the numbers are MMDetection's.
    This package recommends `strength=0.25, ema="debiased", average="positives"` instead.

    Args:
        bins: Number of unit regions `M`, 1 to 1024.
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps no average.
        use_sigmoid: Must be True, as in MMDetection: the loss is a binary cross entropy.
        loss_weight: Multiplies the loss.
        reduction: `mean` divides by the valid entries; `none`; `sum`.
        strength: In [0, 1], or a `StrengthSchedule`: the exponent of the weight; 1 is the paper's.
        ema: `mmdet` (the released average) or `debiased`.
        normalizer: `valid_bins` (released code) or `bins` (the paper).
        average: `mean` divides by `valid` entries (the paper) or `positives`.
        max_weight: Upper bound of a weight, or None.
        backend: `auto`, `triton` or `torch`.
        validate: Check the values of target and weight; None: on the CPU only.

    Raises:
        NotImplementedError: `use_sigmoid` is False.
        ValueError: An option is invalid.
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
        super().__init__(
            GradientDensity(bins, momentum, strength, normalizer, ema, max_weight),
            LossOptions(loss_weight, average, False, reduction, backend, validate),
        )
        self.use_sigmoid = use_sigmoid

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        reduction_override: Reduction | None = None,
        **kwargs: Any,  # noqa: ARG002  (avg_factor and others, ignored by MMDetection too)
    ) -> Tensor:
        """Compute the loss of one pyramid level.

        Args:
            pred: Logits `[N, C]`, float32, float16 or bfloat16.
            target: Binary `[N, C]` of any dtype; or class indices `[N]`, where everything outside
                `0..C-1`, a negative index too, is background (MMDetection ignores by weight).
            label_weight: The shape of `target`; 0 ignores an entry, any positive value keeps it.
                None keeps all.
            reduction_override: Replaces `reduction` for this call.
            **kwargs: `avg_factor` and other arguments of a head; ignored.

        Returns:
            float32 scalar; `[N, C]`, weighted and not divided, for `none`.

        Raises:
            TypeError: A dtype is not supported.
            ValueError: A shape, device, option or (on the CPU) value is invalid.
        """
        if pred.dim() != target.dim():
            classes = pred.shape[-1]
            target = torch.where((target < 0) | (target > classes), classes, target)
            if label_weight is not None:
                label_weight = _by_row(label_weight, target)
        elif not (target.is_floating_point() or target.dtype == torch.bool):
            target = target.float()
        options = self._options(reduction_override)
        return ghm_c_loss(pred, target, label_weight, average=self.average, **options)


class GHMR(_Released):
    """MMDetection's `GHMR`: GHM-R as released (arXiv 1811.05181), one call per pyramid level.

    The keyword-only arguments are additions; with their defaults the numbers are MMDetection's.

    Args:
        mu: Width of the quadratic part of ASL1, positive.
        bins: Number of unit regions `M`, 1 to 1024.
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps no average.
        loss_weight: Multiplies the loss; the released configuration uses 10.
        reduction: `mean` divides by the sum of the weights, which cancels; `none`; `sum`.
        strength: In [0, 1], or a `StrengthSchedule`: the exponent of the weight; 1 is the paper's.
        ema: `mmdet` (the released average) or `debiased`.
        normalizer: `valid_bins` (released code) or `bins` (the paper).
        max_weight: Upper bound of a weight, or None.
        backend: `auto`, `triton` or `torch`.
        validate: Check the values of target and weight; None: on the CPU only.

    Raises:
        ValueError: An option is invalid.
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
        super().__init__(
            GradientDensity(bins, momentum, strength, normalizer, ema, max_weight),
            LossOptions(loss_weight, "valid", False, reduction, backend, validate),
        )
        self.mu = require_mu(mu)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        label_weight: Tensor | None = None,
        avg_factor: float | None = None,  # noqa: ARG002  (ignored by MMDetection too)
        reduction_override: Reduction | None = None,
    ) -> Tensor:
        """Compute the loss of one pyramid level.

        Args:
            pred: Box deltas `[N, 4]` or `[N, 4 * C]`, floating.
            target: The same shape.
            label_weight: The same shape; 0 ignores an entry, any positive value keeps it. None
                keeps all.
            avg_factor: Ignored.
            reduction_override: Replaces `reduction` for this call.

        Returns:
            float32 scalar; the shape of `pred`, weighted and not divided, for `none`.

        Raises:
            TypeError: A dtype is not supported.
            ValueError: A shape, device, option or (on the CPU) value is invalid.
        """
        options = self._options(reduction_override)
        loss = ghm_r_loss(pred, target, label_weight, mu=self.mu, **options)
        if options["reduction"] == "mean" or label_weight is None:
            return loss
        # As released, `tot` is the sum of the weights, not the number of valid entries.
        weight = label_weight.detach()
        entries = (weight > 0).sum().clamp(min=1)
        return loss * (weight.sum(dtype=torch.float32).clamp(min=1) / entries)


def register() -> bool:
    """Register `GHMC` and `GHMR` with MMDetection, in place of its own.

    Called when this module is imported; may be called again. Returns whether MMDetection is
    installed.

    Raises:
        ImportError: MMDetection is installed but cannot be imported.
    """
    if find_spec("mmdet") is None:
        return False
    # MMDetection registers its own without `force`, so they must be registered first.
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


def _by_row(label_weight: Tensor, index: Tensor) -> Tensor:
    if label_weight.numel() != index.numel():
        raise ValueError(
            f"label_weight {list(label_weight.shape)} must have one value per class index,"
            f" {list(index.shape)}"
        )
    return label_weight.reshape(*index.shape, 1)


def _adopt_released_state(
    module: _Released, state: dict[str, Any], prefix: str, *_unused: object
) -> None:
    """Convert the state of MMDetection's own loss: `acc_sum` is the average, `edges` is fixed."""
    if state.pop(f"{prefix}edges", None) is None:
        return
    density = module.density
    smoothed = state.pop(f"{prefix}acc_sum", density.smoothed)
    state[f"{prefix}density.smoothed"] = smoothed
    # It has no number of updates: assume so many that `1 - a^t` is 1 and nothing is corrected.
    settled = math.ceil(math.log(1e-7) / math.log(density.momentum)) if density.momentum else 1
    state[f"{prefix}density.updates"] = torch.full_like(density.updates, settled)


register()
