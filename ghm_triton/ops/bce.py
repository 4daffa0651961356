"""GHM-C: gradient norms of binary cross entropy by unit region, then the weighted loss.

Memory traffic in bytes per element, with `b` those of a logit (4 in float32, 2 in float16 and
bfloat16) and `t` those of a dense target. Counting reads `b + 8 / C` with class indices and `b + t`
with dense targets. Loss and gradient together read the same and write `b`; the table of weights
stays in the first-level cache. A training step with class indices moves `3 b`: 12 bytes in float32
and 6 in bfloat16, the least possible, as the loss depends on all counts. `label_weight` adds its
own bytes to each pass.

Without reduction, and in float16, the gradient has a pass of its own, which reads the inputs again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops import launch
from ghm_triton.ops.device import (
    add_counts,
    bce,
    bce_slope,
    first_tile,
    load_bce,
    next_tile,
    previous_tile,
    unit_region,
    write_results,
)
from ghm_triton.reference.interface import ClassificationInputs, RegionCounts


# fmt: off
@triton.jit(do_not_specialize=["rows", "tiles"])
def count_bce_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    counts_ptr, positives_ptr, tiles,
    INDEX: tl.constexpr, BINS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; one histogram and one sum of targets per program."""
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
        # Entries that are not counted go to a bin of their own: older Triton has no mask here.
        region = tl.where(valid, unit_region(tl.abs(slope), BINS), BINS)
        histogram += tl.histogram(tl.ravel(region), BLOCK_BINS)
        positives = tl.fma(x, 0.0, positives + share)  # NaN once a logit is not finite
        tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    total = tl.sum(tl.ravel(positives).to(tl.float64), axis=0)
    tl.store(positives_ptr + tl.program_id(0), total)
    add_counts(counts_ptr, histogram, total != total, BINS, BLOCK_BINS)


@triton.jit(do_not_specialize=["rows", "tiles"])
def bce_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    table_ptr, scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, INDEX: tl.constexpr, WEIGHTED: tl.constexpr, BINS: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; see `write_results` for LOSS.

    The gradient is `outer * scale * table[region] * (p - p*)`, with `outer` 1 where there is none.
    """
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    scale = tl.load(scale_ptr)
    tile_r, tile_c = first_tile(tiles - 1 - tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, weight, valid, _ = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, INDEX, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        slope = bce_slope(x, target, INDEX)
        region = unit_region(tl.abs(slope), BINS)
        factor = tl.load(table_ptr + region, mask=valid, other=0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        total = write_results(
            total, factor, bce(x, target, INDEX), slope, scale, outer_ptr, outer_row, outer_col,
            loss_ptr, gradient_ptr, gradient_row, gradient_col, tile_r, tile_c, rows, cols,
            LOSS, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        tile_r, tile_c = previous_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on


WEIGHTED_BCE = launch.LossOperator(
    *("weighted_bce", bce_kernel, "bool weighted"),
    constants=lambda target, factors, weighted: {
        "INDEX": target.dim() == 1,
        "WEIGHTED": weighted,
        "BINS": factors[0].numel(),
    },
)


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """Count `|sigmoid(x) - p*|` by unit region, in one pass over the inputs."""
    counts = torch.ops.ghm.count_bce(inputs.logits, inputs.labels, inputs.weight, bins)
    return launch.region_counts(counts, bins)


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """Weighted binary cross entropy; the gradient has the dtype and layout of the logits."""
    data = (inputs.logits, inputs.labels, inputs.weight)
    return WEIGHTED_BCE.apply(*data, table, scale, weighted, reduce=reduce)


def launch_count(logits: Tensor, target: Tensor, weight: Tensor | None, bins: int) -> Tensor:
    """See `launch.count`; `target` is `[R]` (class indices) or `[R, C]`."""
    index = target.dim() == 1
    return launch.count(count_bce_kernel, logits, target, weight, bins, INDEX=index)


launch.define_count("count_bce", launch_count)
