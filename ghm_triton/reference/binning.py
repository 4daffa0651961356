"""Step 1: how many entries fall into each unit region of the gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.interface import ClassificationInputs, RegionCounts, RegressionInputs

LARGE = 1e18  # its square is finite in float32, and mu adds nothing to it


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """Count `g = |sigmoid(x) - p*|` of the valid entries into `bins` unit regions."""
    classes = inputs.logits.shape[1]
    valid = valid_entries(inputs)
    if inputs.index is not None:
        bad_target = (inputs.index > classes).unsqueeze(1)
        foreground = (inputs.index >= 0) & (inputs.index < classes)
        column = inputs.index.clamp(0, classes - 1).unsqueeze(1)
        positives = (foreground.unsqueeze(1) & valid.gather(1, column)).sum().double()
    else:
        target = _dense(inputs)
        bad_target = ~((target >= 0) & (target <= 1))
        positives = torch.where(valid, target, 0.0).sum(dtype=torch.float64)
    sound = valid & torch.isfinite(inputs.logits) & ~bad_target
    regions = _count(gradient_norm(inputs), sound, bins)
    return RegionCounts(regions, positives.view(1), valid.sum() - sound.sum())


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """Count `g = |d| / sqrt(d^2 + mu^2)` of the valid entries into `bins` unit regions."""
    valid = (
        torch.ones_like(inputs.pred, dtype=torch.bool)
        if inputs.weight is None
        else inputs.weight > 0
    )
    d = difference(inputs).detach()
    sound = valid & torch.isfinite(d)
    regions = _count(d.abs() / hypotenuse(d, mu), sound, bins)
    entries = valid.sum()
    return RegionCounts(regions, entries.double().view(1), entries - sound.sum())


def unit_region(norm: Tensor, bins: int) -> Tensor:
    """Index of the unit region that a gradient norm in [0, 1] falls into, int64.

    Region `j` is `[j / M, (j + 1) / M)`; the last one is closed, so `g = 1` belongs to it. NaN
    goes to region 0: it is counted as invalid elsewhere.
    """
    return (norm.nan_to_num(0.0) * bins).long().clamp(0, bins - 1)


def gradient_norm(inputs: ClassificationInputs) -> Tensor:
    """`g = |sigmoid(x) - p*|` of every entry, `[R, C]`."""
    if inputs.index is not None:
        return torch.sigmoid(signed_logits(inputs))
    logits = inputs.logits.detach().to(compute_dtype(inputs.logits))
    return (torch.sigmoid(logits) - _dense(inputs)).abs()


def signed_logits(inputs: ClassificationInputs) -> Tensor:
    """`u = (1 - 2 p*) x` for index targets, so that `g = sigmoid(u)` and `BCE = softplus(u)`."""
    logits = inputs.logits.to(compute_dtype(inputs.logits))
    index: Tensor = inputs.index  # type: ignore[assignment]
    classes = logits.shape[1]
    column = index.clamp(0, classes - 1).unsqueeze(1)
    foreground = ((index >= 0) & (index < classes)).unsqueeze(1)
    own = logits.gather(1, column)
    return logits.scatter(1, column, torch.where(foreground, -own, own))


def valid_entries(inputs: ClassificationInputs) -> Tensor:
    """Return the valid entries: `label_weight > 0` and a class index that is not negative."""
    valid = torch.ones_like(inputs.logits, dtype=torch.bool)
    if inputs.weight is not None:
        valid = inputs.weight > 0
    if inputs.index is not None:
        valid = valid & (inputs.index >= 0).unsqueeze(1)
    return valid


def difference(inputs: RegressionInputs) -> Tensor:
    """`d = pred - target` in the arithmetic's dtype; no gradient reaches the target."""
    dtype = compute_dtype(inputs.pred)
    return inputs.pred.to(dtype) - inputs.target.detach().to(dtype)


def hypotenuse(d: Tensor, mu: float) -> Tensor:
    """`sqrt(d^2 + mu^2)`, without the overflow of the squares.

    Uses operations that are correctly rounded, so that the bits are the same on every machine.
    """
    large = d.abs() > LARGE
    length = torch.sqrt(torch.where(large, 0.0, d).square() + squared_width(mu))
    return torch.where(large, d.abs(), length)


def squared_width(mu: float) -> float:
    """`mu^2`, kept above 0 in float32, so that the slope at `d = 0` is defined."""
    return max(mu, 1 / LARGE) ** 2


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64 tensors."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _dense(inputs: ClassificationInputs) -> Tensor:
    if inputs.target is None:
        raise TypeError("these inputs hold class indices, not dense targets")
    return inputs.target.to(compute_dtype(inputs.logits))


def _count(norm: Tensor, sound: Tensor, bins: int) -> Tensor:
    # Entries that do not count go to an extra region, which is dropped: shapes must not depend on
    # the data, as those of bincount do for a compiler.
    region = torch.where(sound, unit_region(norm.detach(), bins), bins).flatten()
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=region.device)
    return counts.scatter_add_(0, region, torch.ones_like(region))[:bins]
