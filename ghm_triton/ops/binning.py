"""Step 1: how many entries fall into each unit region of the gradient norm.

Memory traffic, bytes an element, with `b` those of a logit (4 float32, 2 float16 and bfloat16):
`count_bce` reads `b + 8 / C` with class indices, `b + t` with dense targets of `t` bytes;
`count_asl1` reads `b + t`. Either adds the bytes of `label_weight`, once a stride of its own. What
is written does not grow with the input: `8 (M + 1)` bytes of counts and 8 a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton._inputs import ClassificationInputs, RegressionInputs
from ghm_triton.ops.tiles import OPTIONS, pointer, strides, tile_entries, tiling
from ghm_triton.reference.binning import RegionCounts


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `ghm_triton.reference.count_bce`, in one pass over the inputs."""
    cut = tiling(inputs.logits)
    counts, positives = _outputs(inputs.logits, bins, cut.programs)
    with torch.cuda.device_of(inputs.logits):
        count_bce_kernel[(cut.programs,)](
            *bce_arguments(inputs),
            counts,
            positives,
            INDEX=inputs.index is not None,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 2),
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            **OPTIONS,
        )
    return RegionCounts(counts[:bins], positives, counts[bins])


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """As `ghm_triton.reference.count_asl1`, in one pass over the inputs."""
    cut = tiling(inputs.pred)
    counts, positives = _outputs(inputs.pred, bins, cut.programs)
    with torch.cuda.device_of(inputs.pred):
        count_asl1_kernel[(cut.programs,)](
            *asl1_arguments(inputs),
            counts,
            positives,
            MU=mu,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 2),
            BLOCK_R=cut.block_r,
            BLOCK_C=cut.block_c,
            **OPTIONS,
        )
    return RegionCounts(counts[:bins], positives, counts[bins])


def bce_arguments(inputs: ClassificationInputs) -> tuple[Tensor | int | None, ...]:
    """The leading arguments of every classification kernel: pointers, strides, shape."""
    target = inputs.target if inputs.index is None else inputs.index
    logits, weight = inputs.logits.detach(), inputs.weight
    return (
        *(logits, pointer(target), pointer(weight)),
        *(*strides(logits), *strides(target), *strides(weight)),
        *logits.shape,
    )


def asl1_arguments(inputs: RegressionInputs) -> tuple[Tensor | int | None, ...]:
    """The leading arguments of every regression kernel: pointers, strides, shape."""
    pred, target, weight = inputs.pred.detach(), inputs.target, inputs.weight
    return (
        *(pred, target, pointer(weight)),
        *(*strides(pred), *strides(target), *strides(weight)),
        *pred.shape,
    )


def _outputs(like: Tensor, bins: int, programs: int) -> tuple[Tensor, Tensor]:
    # Integers are added atomically: no order changes their sum. Floats are not: one slot a program.
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=like.device)
    return counts, torch.empty(programs, dtype=torch.float64, device=like.device)


# fmt: off
@triton.jit
def load_bce(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    tile, INDEX: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One tile: logits and targets in float32, weights, which are valid, which of these are sound.

    An unsound entry (a logit that is not finite, a target out of range) reads as 0 and 0.
    """
    row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
    logits = tl.load(logits_ptr + row * logits_row + col * logits_col, mask=exists, other=0.0)
    logits = logits.to(tl.float32)
    valid = exists
    weight = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        stored = tl.load(weight_ptr + row * weight_row + col * weight_col, mask=exists, other=0)
        valid = exists & (stored > 0)
        weight = stored.to(tl.float32)
    if INDEX:
        label = tl.load(target_ptr + row * target_row, mask=row < rows, other=-1)
        valid = valid & (label >= 0)
        target = (label == col).to(tl.float32)
        in_range = label <= cols
    else:
        target = tl.load(target_ptr + row * target_row + col * target_col, mask=exists, other=0)
        target = target.to(tl.float32)
        in_range = (target >= 0.0) & (target <= 1.0)
    sound = valid & in_range & (tl.abs(logits) < float("inf"))
    return tl.where(sound, logits, 0.0), tl.where(sound, target, 0.0), weight, valid, sound


@triton.jit
def bce_terms(x, target, INDEX: tl.constexpr):
    """`dBCE/dx = p - p*`, and two terms whose sum is BCE; one exponential serves all.

    With class indices `u = (1 - 2 p*) x`: `g = sigmoid(u)` and `BCE = softplus(u)`.
    """
    exponential = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + exponential)
    if INDEX:
        u = tl.where(target > 0.0, -x, x)
        norm = tl.where(u >= 0.0, inverse, exponential * inverse)
        gradient = tl.where(target > 0.0, -norm, norm)
        linear = tl.maximum(u, 0.0)
    else:
        gradient = tl.where(x >= 0.0, inverse, exponential * inverse) - target
        linear = tl.maximum(x, 0.0) - x * target
    # log(1 + e) loses e below 2^-24; the second term gives back what rounding 1 + e took.
    whole = 1.0 + exponential
    return gradient, linear, tl.log(whole) + (exponential - (whole - 1.0)) * inverse


@triton.jit
def load_asl1(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """One tile: `d = pred - target`, weights, which are valid, which of these are finite."""
    row, col, exists = tile_entries(tile, rows, cols, BLOCK_R, BLOCK_C)
    pred = tl.load(pred_ptr + row * pred_row + col * pred_col, mask=exists, other=0.0)
    target = tl.load(target_ptr + row * target_row + col * target_col, mask=exists, other=0.0)
    valid = exists
    weight = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32)
    if weight_ptr is not None:
        stored = tl.load(weight_ptr + row * weight_row + col * weight_col, mask=exists, other=0)
        valid = exists & (stored > 0)
        weight = stored.to(tl.float32)
    d = pred.to(tl.float32) - target.to(tl.float32)
    sound = valid & (tl.abs(d) < float("inf"))
    return tl.where(sound, d, 0.0), weight, valid, sound


@triton.jit
def hypotenuse(d, MU: tl.constexpr):
    """`sqrt(d^2 + mu^2)` that neither overflows nor vanishes."""
    large = tl.maximum(tl.abs(d), MU)
    ratio = tl.minimum(tl.abs(d), MU) / large
    return large * tl.sqrt(1.0 + ratio * ratio)


@triton.jit
def unit_region(norm, BINS: tl.constexpr):
    """The region of a norm, for counting and weighing alike; `g = 1` belongs to the last."""
    return tl.minimum((norm * BINS).to(tl.int32), BINS - 1)


@triton.jit
def counted_region(region, valid, sound, BINS: tl.constexpr):
    """The region to count in: BINS for unsound entries, BINS + 1 for what is not counted.

    A bin for the rest instead of a mask: older Triton cannot mask a histogram.
    """
    return tl.where(sound, region, tl.where(valid, BINS, BINS + 1))


@triton.jit
def add_counts(counts_ptr, histogram, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr):
    """Add a program's histogram to the counts, less the bin of what is not counted."""
    region = tl.arange(0, BLOCK_BINS)
    present = (region <= BINS) & (histogram > 0)
    tl.atomic_add(counts_ptr + region, histogram.to(tl.int64), mask=present, sem="relaxed")


@triton.jit(do_not_specialize=["rows"])
def count_bce_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr,
    INDEX: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one sum of targets a program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    positives = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(cols, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, _, valid, sound = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile, INDEX, BLOCK_R, BLOCK_C,
        )
        gradient, _, _ = bce_terms(x, target, INDEX)
        region = counted_region(unit_region(tl.abs(gradient), BINS), valid, sound, BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        positives += target
    add_counts(counts_ptr, histogram, BINS, BLOCK_BINS)
    total = tl.sum(tl.ravel(positives).to(tl.float64), axis=0)
    tl.store(positives_ptr + tl.program_id(0), total)


@triton.jit(do_not_specialize=["rows"])
def count_asl1_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr,
    positives_ptr,
    MU: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of entries a program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    tiles = tl.cdiv(rows, BLOCK_R) * tl.cdiv(cols, BLOCK_C)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        d, _, valid, sound = load_asl1(
            pred_ptr, target_ptr, weight_ptr,
            pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile, BLOCK_R, BLOCK_C,
        )
        region = unit_region(tl.abs(d) / hypotenuse(d, MU), BINS)
        region = counted_region(region, valid, sound, BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
    add_counts(counts_ptr, histogram, BINS, BLOCK_BINS)
    # Every valid entry is a positive sample's.
    counted = tl.where(tl.arange(0, BLOCK_BINS) <= BINS, histogram, 0)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(counted, axis=0).to(tl.float64))
# fmt: on
