"""The losses: the gradient norms counted by unit region, and the weighted losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton.reference.interface import (
    ClassificationInputs,
    Focus,
    RegionCounts,
    RegressionInputs,
    SoftmaxInputs,
)

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


def count_asl1(inputs: RegressionInputs, bins: int) -> RegionCounts:
    """Count `g = |d| / sqrt(d^2 + mu^2)` of the valid entries into `bins` unit regions."""
    valid = (
        torch.ones_like(inputs.pred, dtype=torch.bool)
        if inputs.weight is None
        else inputs.weight > 0
    )
    d = difference(inputs).detach()
    sound = valid & torch.isfinite(d)
    regions = _count(d.abs() / hypotenuse(d, inputs.mu), sound, bins)
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


def weighted_asl1(
    inputs: RegressionInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """`scale * sum_i table[region(g_i)] * (sqrt(d_i^2 + mu^2) - mu)`, differentiable in `pred`.

    Arguments and result as in `weighted_bce`.
    """
    d = difference(inputs)
    with torch.no_grad():
        factor = table[unit_region(d.abs() / hypotenuse(d, inputs.mu), len(table))]
    if inputs.weight is not None:
        valid = inputs.weight > 0
        kept = factor * inputs.weight.to(factor.dtype) if weighted else factor
        factor = torch.where(valid, kept, 0.0)
        d = torch.where(valid, d, 0.0)
    loss = factor * _asl1(d, inputs.mu)
    return (loss.sum() if reduce else loss) * scale


def _asl1(d: Tensor, mu: float) -> Tensor:
    # sqrt(d^2 + mu^2) - mu loses every digit when d << mu; this form keeps them.
    return d * (d / (hypotenuse(d, mu) + mu))


def weighted_focal(
    inputs: ClassificationInputs, scale: Tensor, focus: Focus, *, weighted: bool, reduce: bool
) -> Tensor:
    """`scale * sum_i -alpha_t (1 - p_t)^gamma log(p_t)`, differentiable in the logits.

    A logit that is not finite, or a target out of range, makes its entry NaN. Arguments and result
    as in `weighted_bce`.
    """
    alpha, gamma = focus
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
