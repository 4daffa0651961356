"""Step 3 for classification: binary cross entropy, weighted by unit region."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.binning import (
    compute_dtype,
    gradient_norm,
    signed_logits,
    unit_region,
    valid_entries,
)
from ghm_triton.reference.interface import ClassificationInputs

# torch's softplus turns linear above its threshold; at 80 the difference is below 1e-34.
EXACT_UNTIL = 80


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """`scale * sum_i table[region(g_i)] * BCE(x_i, p*_i)`, differentiable in the logits.

    Args:
        inputs: Logits and targets.
        table: float32 `[M]`, the weight of each unit region; a constant.
        scale: float32 scalar that multiplies the result.
        weighted: Whether `label_weight` multiplies, or only selects.
        reduce: Sum to a scalar, or keep the `[R, C]` entries.

    Returns:
        A scalar, or `[R, C]`, in float32 (float64 for float64 logits).
    """
    valid = valid_entries(inputs)
    with torch.no_grad():
        factor = table[unit_region(gradient_norm(inputs), len(table))]
        if weighted and inputs.weight is not None:
            factor = factor * inputs.weight.to(factor.dtype)
        factor = torch.where(valid, factor, 0.0)
    # Mask before the logarithm: a NaN under an ignored entry must not reach its gradient.
    loss = factor * _bce(inputs, valid)
    return (loss.sum() if reduce else loss) * scale


def _bce(inputs: ClassificationInputs, valid: Tensor) -> Tensor:
    if inputs.index is not None:
        u = torch.where(valid, signed_logits(inputs), 0.0)
        return torch.nn.functional.softplus(u, threshold=EXACT_UNTIL)
    logits = torch.where(valid, inputs.logits.to(compute_dtype(inputs.logits)), 0.0)
    target: Tensor = inputs.target  # type: ignore[assignment]
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, torch.where(valid, target.to(logits.dtype), 0.0), reduction="none"
    )
