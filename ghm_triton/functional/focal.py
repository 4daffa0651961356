"""Sigmoid focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton._inputs import ClassificationInputs, classification_inputs
from ghm_triton.backend import select_backend
from ghm_triton.functional.options import Average, Backend, Reduction, require_reduction
from ghm_triton.reference.binning import compute_dtype
from ghm_triton.reference.focal import entries, positives


def focal_loss(
    logits: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    average: Average = "positives",
    loss_weight: float = 1.0,
    weighted: bool = False,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    validate: bool | None = None,
) -> Tensor:
    r"""Sigmoid focal loss: `-alpha_t (1 - p_t)^gamma log(p_t)` (arXiv 1708.02002, equation 5).

    For comparison with the harmonized losses, by their conventions and under the same roof.

    Args:
        logits: As in `ghm_c_loss`.
        target: As in `ghm_c_loss`; dense targets interpolate between the two sides.
        label_weight: As in `ghm_c_loss`.
        alpha: Weight of the positives, in [0, 1]; negatives have `1 - alpha`.
        gamma: Focusing exponent, at least 0.
        average: As in `ghm_c_loss`.
        loss_weight: Multiplies the loss.
        weighted: As in `ghm_c_loss`.
        reduction: As in `ghm_c_loss`.
        backend: As in `ghm_c_loss`.
        validate: As in `ghm_c_loss`.

    Returns:
        float32 scalar, or the shape of `logits`. A non-finite logit at a valid entry makes the loss
        NaN. Without valid entries the loss is 0.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, option or value does not fit.
    """
    require_reduction(reduction, average)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    inputs = classification_inputs(logits, target, label_weight, validate)
    kernels = select_backend(backend, logits)
    with torch.no_grad():
        scale = _scale(inputs, reduction, average, loss_weight)
    loss: Tensor = kernels.weighted_focal(
        inputs, scale, alpha=alpha, gamma=gamma, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


def _scale(
    inputs: ClassificationInputs, reduction: str, average: str, loss_weight: float
) -> Tensor:
    """What multiplies the sum, a scalar in the arithmetic's dtype, where the logits are."""
    dtype = compute_dtype(inputs.logits)
    scale = torch.full((), loss_weight, dtype=dtype, device=inputs.logits.device)
    if reduction != "mean":
        return scale
    divisor = entries(inputs) if average == "valid" else positives(inputs)
    return scale / divisor.clamp(min=1).to(dtype)
