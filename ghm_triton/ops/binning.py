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

from ghm_triton.ops.arithmetic import asl1, bce_slope, unit_region
from ghm_triton.ops.loads import arguments, load_bce, load_difference
from ghm_triton.ops.tiles import MAX_PROGRAMS, OPTIONS, alignment, first_tile, next_tile, tiling


def count_bce(logits: Tensor, target: Tensor, weight: Tensor | None, bins: int) -> Tensor:
    """Count `|sigmoid(x) - p*|`; `target` is `[R]` (class indices) or `[R, C]`.

    Returns:
        int64 `[bins + 1 + MAX_PROGRAMS]`: a count a region; how many programs met an entry that
        is not finite or out of range; and the bits of float64 partial sums of the targets.
    """
    cut, out = tiling(logits), scratch(bins, logits.device)
    align = alignment(logits, target, weight)
    with torch.cuda.device_of(logits):
        count_bce_kernel[(cut.programs,)](
            *arguments(logits, target, weight, align),
            out,
            out[bins + 1 :].view(torch.float64),
            cut.tiles,
            INDEX=target.dim() == 1,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 1),
            **cut.constants(logits.shape[1], align),
            **OPTIONS,
        )
    return out


def count_asl1(pred: Tensor, target: Tensor, weight: Tensor | None, bins: int, mu: float) -> Tensor:
    """Count `|d| / sqrt(d^2 + mu^2)`; the result is laid out as that of `count_bce`."""
    cut, out = tiling(pred), scratch(bins, pred.device)
    align = alignment(pred, target, weight)
    with torch.cuda.device_of(pred):
        count_asl1_kernel[(cut.programs,)](
            *arguments(pred, target, weight, align),
            out,
            out[bins + 1 :].view(torch.float64),
            cut.tiles,
            MU=mu,
            BINS=bins,
            BLOCK_BINS=triton.next_power_of_2(bins + 1),
            **cut.constants(pred.shape[1], align),
            **OPTIONS,
        )
    return out


def scratch(bins: int, device: torch.device) -> Tensor:
    """Zeros for counts and partial sums, in one allocation: one launch fills it.

    Counts are integers and added atomically: no order changes their sum. Floats are not: each
    program has a slot of its own.
    """
    return torch.zeros(bins + 1 + MAX_PROGRAMS, dtype=torch.int64, device=device)


# fmt: off
@triton.jit
def add_counts(counts_ptr, histogram, harmed, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr):
    """Add a program's histogram to the counts; the last one says instead if it was harmed."""
    region = tl.arange(0, BLOCK_BINS)
    histogram = tl.where(region < BINS, histogram, harmed.to(tl.int32))
    present = (region <= BINS) & (histogram > 0)
    tl.atomic_add(counts_ptr + region, histogram.to(tl.int64), mask=present, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_bce_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    INDEX: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one sum of targets a program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    positives = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tile_r, tile_c = first_tile(tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, _, valid, share = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, INDEX, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        slope = bce_slope(x, target, INDEX)
        # What is not counted has a bin of its own: a mask is not known to older Triton.
        region = tl.where(valid, unit_region(tl.abs(slope), BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        positives = tl.fma(x, 0.0, positives + share)  # NaN once a logit is not finite
        tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    total = tl.sum(tl.ravel(positives).to(tl.float64), axis=0)
    tl.store(positives_ptr + tl.program_id(0), total)
    add_counts(counts_ptr, histogram, total != total, BINS, BLOCK_BINS)


@triton.jit(do_not_specialize=["rows", "tiles"])
def count_asl1_kernel(
    pred_ptr, target_ptr, weight_ptr,
    pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    MU: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one number of entries a program."""
    histogram = tl.zeros([BLOCK_BINS], tl.int32)
    harm = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    tile_r, tile_c = first_tile(tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        d, _, valid = load_difference(
            pred_ptr, target_ptr, weight_ptr,
            pred_row, pred_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        _, slope = asl1(d, MU)
        region = tl.where(valid, unit_region(tl.abs(slope), BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        harm = tl.fma(d, 0.0, harm)  # 0 times what is not finite is NaN
        tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    harm = tl.sum(tl.ravel(harm), axis=0)
    add_counts(counts_ptr, histogram, harm != harm, BINS, BLOCK_BINS)
    # Every valid entry is a positive sample's.
    counted = tl.where(tl.arange(0, BLOCK_BINS) < BINS, histogram, 0)
    tl.store(positives_ptr + tl.program_id(0), tl.sum(counted, axis=0).to(tl.float64))
# fmt: on
