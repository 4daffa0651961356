"""Softmax GHM, an extension: `g = 1 - p_y`, one entry per row."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.binning import compute_dtype, unit_region
from ghm_triton.reference.interface import RegionCounts, SoftmaxInputs

MAX_CLASSES = 4096  # the limit of the kernels: a row is one tile


def count_softmax(inputs: SoftmaxInputs, bins: int) -> RegionCounts:
    """Count `g = 1 - p_y` of the valid rows into `bins` unit regions."""
    valid = valid_rows(inputs)
    known = inputs.index < inputs.logits.shape[1]
    sound = valid & known & torch.isfinite(inputs.logits).all(dim=1)
    region = torch.where(sound, unit_region(row_norm(inputs), bins), bins)
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=region.device)
    counts.scatter_add_(0, region, torch.ones_like(region))
    rows = valid.sum()
    return RegionCounts(counts[:bins], rows.double().view(1), rows - sound.sum())


def weighted_softmax(
    inputs: SoftmaxInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """`scale * sum_i table[region(g_i)] * -log p_y`, differentiable in the logits.

    Arguments as in `weighted_bce`; the entries are rows: without `reduce` the loss is `[R]`.
    """
    valid = valid_rows(inputs)
    with torch.no_grad():
        factor = table[unit_region(row_norm(inputs), len(table))]
        if weighted and inputs.weight is not None:
            factor = factor * inputs.weight.to(factor.dtype)
        factor = torch.where(valid, factor, 0.0)
    loss = factor * _cross_entropy(inputs, valid)
    return (loss.sum() if reduce else loss) * scale


def _cross_entropy(inputs: SoftmaxInputs, valid: Tensor) -> Tensor:
    """`-log p_y` of every row, `[R]`; small and large losses keep their digits."""
    column = _column(inputs)
    logits = torch.where(valid[:, None], inputs.logits.to(compute_dtype(inputs.logits)), 0.0)
    peak = logits.detach().amax(dim=1)
    e = torch.exp(logits - peak[:, None])
    own = e.gather(1, column).squeeze(1)
    others = e.scatter(1, column, 0.0).sum(dim=1)
    # log(1 + others / own) where that is small. Each form is used only where it is finite.
    mild = others <= own
    small = torch.log1p(torch.where(mild, others, 0.0) / torch.where(mild, own, 1.0))
    large = peak - logits.gather(1, column).squeeze(1) + torch.log(own + others)
    return torch.where(mild, small, large)


def row_norm(inputs: SoftmaxInputs) -> Tensor:
    """`g = 1 - p_y` of every row, `[R]`: the sum of the other classes, which does not cancel."""
    logits = inputs.logits.detach().to(compute_dtype(inputs.logits))
    return torch.softmax(logits, dim=1).scatter(1, _column(inputs), 0.0).sum(dim=1).clamp(max=1.0)


def valid_rows(inputs: SoftmaxInputs) -> Tensor:
    """Return the valid rows, `[R]`: `label_weight > 0` and a class index that is not negative."""
    valid = inputs.index >= 0
    return valid if inputs.weight is None else valid & (inputs.weight > 0)


def _column(inputs: SoftmaxInputs) -> Tensor:
    return inputs.index.clamp(0, inputs.logits.shape[1] - 1).unsqueeze(1)
