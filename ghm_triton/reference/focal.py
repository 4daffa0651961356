"""Sigmoid focal loss, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton._inputs import ClassificationInputs
from ghm_triton.reference.bce import EXACT_UNTIL
from ghm_triton.reference.binning import compute_dtype, valid_entries


def focal_entries(
    inputs: ClassificationInputs, alpha: float, gamma: float, weighted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Focal loss of every entry.

    Returns:
        The losses `[R, C]` (0 where ignored), the number of valid entries and the sum of their
        targets.
    """
    valid = valid_entries(inputs)
    target = _targets(inputs)
    logits = inputs.logits.to(compute_dtype(inputs.logits))
    logits = torch.where(valid, logits, 0.0)
    softplus = torch.nn.functional.softplus
    positive = torch.sigmoid(-logits) ** gamma * softplus(-logits, threshold=EXACT_UNTIL)
    negative = torch.sigmoid(logits) ** gamma * softplus(logits, threshold=EXACT_UNTIL)
    loss = alpha * target * positive + (1 - alpha) * (1 - target) * negative
    if weighted and inputs.weight is not None:
        loss = loss * inputs.weight
    loss = torch.where(valid, loss, 0.0)
    return loss, valid.sum(), torch.where(valid, target, 0.0).sum()


def _targets(inputs: ClassificationInputs) -> Tensor:
    if inputs.index is None:
        target: Tensor = inputs.target  # type: ignore[assignment]
        return target.to(compute_dtype(inputs.logits))
    classes = inputs.logits.shape[1]
    one_hot = torch.zeros_like(inputs.logits, dtype=compute_dtype(inputs.logits))
    column = inputs.index.clamp(0, classes - 1).unsqueeze(1)
    foreground = ((inputs.index >= 0) & (inputs.index < classes)).unsqueeze(1)
    return one_hot.scatter(1, column, foreground.to(one_hot.dtype))
