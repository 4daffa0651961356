"""Step 3 for regression: authentic smooth L1, weighted by unit region."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.binning import difference, hypotenuse, unit_region
from ghm_triton.reference.interface import RegressionInputs


def weighted_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    *,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """`scale * sum_i table[region(g_i)] * (sqrt(d_i^2 + mu^2) - mu)`, differentiable in `pred`.

    Arguments and result as in `weighted_bce`, with `mu` the width of the quadratic part.
    """
    d = difference(inputs)
    with torch.no_grad():
        factor = table[unit_region(d.abs() / hypotenuse(d, mu), len(table))]
    if inputs.weight is not None:
        valid = inputs.weight > 0
        kept = factor * inputs.weight.to(factor.dtype) if weighted else factor
        factor = torch.where(valid, kept, 0.0)
        d = torch.where(valid, d, 0.0)
    loss = factor * _asl1(d, mu)
    return (loss.sum() if reduce else loss) * scale


def _asl1(d: Tensor, mu: float) -> Tensor:
    # sqrt(d^2 + mu^2) - mu loses every digit when d << mu; this form keeps them.
    return d * (d / (hypotenuse(d, mu) + mu))
