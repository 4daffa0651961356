"""Sigmoid focal loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghm_triton.losses.backend import BACKENDS, select_backend
from ghm_triton.losses.inputs import classification_inputs, require_choice
from ghm_triton.losses.options import Average, Backend, Reduction, require_reduction
from ghm_triton.reference.binning import compute_dtype
from ghm_triton.reference.focal import entries, positives
from ghm_triton.reference.interface import ClassificationInputs


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


class FocalLoss(nn.Module):
    """Sigmoid focal loss with the target conventions of `GHMCLoss` (arXiv 1708.02002).

    Args:
        alpha: Weight of the positives, in [0, 1].
        gamma: Focusing exponent, at least 0.
        loss_weight: Multiplies the loss.
        average: `positives` (the paper) or `valid`.
        weighted: Multiply by `label_weight` as well as select by it.
        reduction: `mean`, `sum` or `none`.
        backend: `auto`, `triton` or `torch`.
        validate: As in `ghm_c_loss`.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        loss_weight: float = 1.0,
        average: Average = "positives",
        weighted: bool = False,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        require_reduction(reduction, average)
        require_choice("backend", backend, BACKENDS)
        self.alpha = alpha
        self.gamma = gamma
        self.loss_weight = loss_weight
        self.average: Average = average
        self.weighted = weighted
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.validate = validate

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes, dtypes and errors as in `focal_loss`."""
        return focal_loss(
            logits,
            target,
            label_weight,
            alpha=self.alpha,
            gamma=self.gamma,
            average=self.average,
            loss_weight=self.loss_weight,
            weighted=self.weighted,
            reduction=self.reduction,
            backend=self.backend,
            validate=self.validate,
        )
