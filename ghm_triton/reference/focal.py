"""Sigmoid focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.bce import EXACT_UNTIL
from ghm_triton.reference.binning import compute_dtype, valid_entries
from ghm_triton.reference.interface import ClassificationInputs


def weighted_focal(
    inputs: ClassificationInputs,
    scale: Tensor,
    *,
    alpha: float,
    gamma: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """`scale * sum_i -alpha_t (1 - p_t)^gamma log(p_t)`, differentiable in the logits.

    A logit that is not finite, or a target out of range, makes its entry NaN. Arguments and result
    as in `weighted_bce`.
    """
    valid = valid_entries(inputs)
    target = torch.where(torch.isfinite(inputs.logits), _targets(inputs), float("nan"))
    logits = inputs.logits.to(compute_dtype(inputs.logits))
    logits = torch.where(valid, logits, 0.0)
    # -log(1 - p) and -log(p). (1 - p)^gamma by exp: a power has no finite slope at 0.
    absent = torch.nn.functional.softplus(logits, threshold=EXACT_UNTIL)
    present = torch.nn.functional.softplus(-logits, threshold=EXACT_UNTIL)
    positive = torch.exp(-gamma * absent) * present
    negative = torch.exp(-gamma * present) * absent
    loss = alpha * target * positive + (1 - alpha) * (1 - target) * negative
    if weighted and inputs.weight is not None:
        loss = loss * inputs.weight.to(loss.dtype)
    loss = torch.where(valid, loss, 0.0)
    return (loss.sum() if reduce else loss) * scale


def entries(inputs: ClassificationInputs) -> Tensor:
    """Return the number of valid entries, an integer scalar."""
    if inputs.weight is None and inputs.index is not None:
        return (inputs.index >= 0).sum() * inputs.logits.shape[1]
    return valid_entries(inputs).sum()


def positives(inputs: ClassificationInputs) -> Tensor:
    """Return the sum of the targets of the valid entries, float64 scalar."""
    classes = inputs.logits.shape[1]
    if inputs.index is None:
        target: Tensor = inputs.target  # type: ignore[assignment]
        if inputs.weight is not None:
            target = torch.where(inputs.weight > 0, target, 0.0)
        return target.sum(dtype=torch.float64)
    foreground = (inputs.index >= 0) & (inputs.index < classes)
    if inputs.weight is not None:
        column = inputs.index.clamp(0, classes - 1).unsqueeze(1)
        foreground = foreground & (inputs.weight.gather(1, column).squeeze(1) > 0)
    return foreground.sum().double()


def _targets(inputs: ClassificationInputs) -> Tensor:
    nan = float("nan")
    if inputs.index is None:
        target: Tensor = inputs.target  # type: ignore[assignment]
        target = target.to(compute_dtype(inputs.logits))
        return torch.where((target >= 0) & (target <= 1), target, nan)
    classes = inputs.logits.shape[1]
    one_hot = torch.zeros_like(inputs.logits, dtype=compute_dtype(inputs.logits))
    column = inputs.index.clamp(0, classes - 1).unsqueeze(1)
    foreground = ((inputs.index >= 0) & (inputs.index < classes)).unsqueeze(1)
    one_hot = one_hot.scatter(1, column, foreground.to(one_hot.dtype))
    return torch.where((inputs.index > classes).unsqueeze(1), nan, one_hot)
