"""Sigmoid focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.losses.inputs import classification_inputs
from ghm_triton.losses.options import (
    Average,
    Backend,
    LossModule,
    LossOptions,
    Reduction,
    select_backend,
)
from ghm_triton.reference.interface import ClassificationInputs, Focus
from ghm_triton.reference.losses import compute_dtype, entries, positives


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
    r"""Sigmoid focal loss, with the target conventions of the harmonized losses.

    $$ L = -\frac{1}{N} \sum_i \alpha_t (1 - p_t)^\gamma \log p_t $$

    Equation 5 of arXiv 1708.02002. Dense targets interpolate between the terms of a positive and
    of a negative.

    Args:
        logits: `[..., C]`, float32, float16 or bfloat16, any strides; arithmetic in float32.
            float64 runs in torch.
        target: Dense, the shape of `logits`, floating in [0, 1] or bool; or class indices, integer
            `logits.shape[:-1]`: `0..C-1` foreground, `C` background, negative ignored.
        label_weight: Broadcasts to `logits`; 0 ignores an entry, any positive value keeps it.
        alpha: Weight of the positives, in [0, 1]; negatives have `1 - alpha`.
        gamma: Focusing exponent, at least 0.
        average: `mean` divides by `positives`: the sum of the targets, at least 1 (the paper); or
            by the number of `valid` entries.
        loss_weight: Multiplies the loss.
        weighted: Multiply by `label_weight` as well.
        reduction: `mean`, `sum` (not divided), or `none` (the shape of `logits`).
        backend: `auto`, `triton` or `torch`.
        validate: Check the values of target and weight, which synchronises with a GPU. None: on the
            CPU only; elsewhere a target out of range makes its entries NaN instead.

    Returns:
        float32 scalar, or the shape of `logits`. A non-finite logit at a valid entry makes the loss
        NaN. Without valid entries the loss is 0.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device, option or (when validating) value is invalid.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -1.0], [-3.0, 0.5]], requires_grad=True)
        >>> loss = focal_loss(logits, torch.tensor([0, 2]))  # the second row is background
        >>> loss.backward()
    """
    options = LossOptions(loss_weight, average, weighted, reduction, backend, validate)
    _require_factors(alpha, gamma)
    inputs = classification_inputs(logits, target, label_weight, validate)
    return _focal(inputs, options, Focus(alpha, gamma))


class FocalLoss(LossModule):
    """Sigmoid focal loss as a module; see `focal_loss` for the equation.

    Its options are those of `focal_loss`; they are attributes, which may be changed.

    Raises:
        ValueError: An option is invalid.

    Example:
        >>> import torch
        >>> criterion = FocalLoss()
        >>> loss = criterion(torch.randn(8, 100, 80), torch.randint(0, 81, (8, 100)))
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
        super().__init__(LossOptions(loss_weight, average, weighted, reduction, backend, validate))
        _require_factors(alpha, gamma)
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Compute the loss; shapes, dtypes and errors are those of `focal_loss`."""
        inputs = classification_inputs(logits, target, label_weight, self.validate)
        return _focal(inputs, self, Focus(self.alpha, self.gamma))


def _require_factors(alpha: float, gamma: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")


def _focal(inputs: ClassificationInputs, options: LossOptions, focus: Focus) -> Tensor:
    kernels = select_backend(options.backend, inputs.logits)
    reduce = options.reduction != "none"
    with torch.no_grad():
        scale = _scale(inputs, options)
    loss = kernels.weighted_focal(inputs, scale, focus, weighted=options.weighted, reduce=reduce)
    return loss if reduce else loss.view(inputs.shape)


def _scale(inputs: ClassificationInputs, options: LossOptions) -> Tensor:
    """Return the factor of the sum: a scalar in the dtype of the arithmetic."""
    dtype = compute_dtype(inputs.logits)
    scale = torch.full((), options.loss_weight, dtype=dtype, device=inputs.logits.device)
    if options.reduction != "mean":
        return scale
    divisor = entries(inputs) if options.average == "valid" else positives(inputs)
    return scale / divisor.clamp(min=1).to(dtype)
