"""Sigmoid focal loss and its gradient in one pass.

Memory traffic in bytes per element, with `b` those of a logit (4 in float32, 2 in float16 and
bfloat16): `b + 8 / C` read with class indices or `b + t` with dense targets of `t` bytes, and `b`
written. A gradient pass of its own as in `bce.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ghm_triton.ops import launch
from ghm_triton.ops.device import (
    LOG2_E,
    first_tile,
    load_bce,
    log1p,
    next_tile,
    reciprocal,
    write_results,
)
from ghm_triton.reference.interface import ClassificationInputs, Focus


# fmt: off
@triton.jit
def power(q, GAMMA: tl.constexpr):
    """`q ** gamma` for q in [0, 1]."""
    if GAMMA == 0:
        result = tl.full(q.shape, 1.0, tl.float32)
    elif GAMMA == 1:
        result = q
    elif GAMMA == 2:
        result = q * q
    else:
        result = tl.exp2(GAMMA * tl.log2(q))
    return result


@triton.jit
def one_side(u, large, small, series, GAMMA: tl.constexpr):
    """Compute `q^gamma * softplus(u)` with `q = sigmoid(u) = 1 - p_t`, and its slope.

    `large` and `small` are `sigmoid(|u|)` and `sigmoid(-|u|)`, so that neither `q` nor `1 - q`
    cancels; `series` is `log(1 + exp(-|u|))`.
    """
    bce = tl.maximum(u, 0.0) + series
    q = tl.where(u > 0.0, large, small)
    rest = tl.where(u > 0.0, small, large)
    factor = power(q, GAMMA)
    return factor * bce, factor * (GAMMA * (rest * bce) + q)


@triton.jit(do_not_specialize=["rows", "tiles"])
def focal_kernel(
    logits_ptr, target_ptr, weight_ptr,
    logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
    scale_ptr, outer_ptr, outer_row, outer_col,
    loss_ptr, gradient_ptr, gradient_row, gradient_col, tiles,
    LOSS: tl.constexpr, INDEX: tl.constexpr, WEIGHTED: tl.constexpr,
    ALPHA: tl.constexpr, GAMMA: tl.constexpr,
    WHOLE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Walk over tiles; see `write_results` for LOSS.

    A dense target `t` mixes the two sides: `t` of the positive's, `1 - t` of the negative's. A
    share is the target, or NaN where that is out of range.
    """
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    scale = tl.load(scale_ptr)
    tile_r, tile_c = first_tile(tl.program_id(0), cols, BLOCK_C)
    step_r, step_c = first_tile(tl.num_programs(0), cols, BLOCK_C)
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        x, target, weight, valid, share = load_bce(
            logits_ptr, target_ptr, weight_ptr,
            logits_row, logits_col, target_row, target_col, weight_row, weight_col, rows, cols,
            tile_r, tile_c, INDEX, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        e = tl.exp2(tl.abs(x) * -LOG2_E)
        large = reciprocal(1.0 + e)
        small, series = e * large, tl.fma(x, 0.0, log1p(e))  # NaN where x is not finite
        if INDEX:
            loss, slope = one_side(tl.where(target, -x, x), large, small, series, GAMMA)
            slope = tl.where(target, -slope, slope)
            # Values that are the same along a row are computed once per row.
            present = tl.where(valid, ALPHA, 0.0)  # a class out of range is never present
            absent = tl.where(valid, tl.fma(share, 0.0, 1.0 - ALPHA), 0.0)
            factor = tl.where(target, present, absent)
        else:
            positive, down = one_side(-x, large, small, series, GAMMA)
            negative, up = one_side(x, large, small, series, GAMMA)
            loss = ALPHA * share * positive + (1.0 - ALPHA) * (1.0 - share) * negative
            slope = (1.0 - ALPHA) * (1.0 - share) * up - ALPHA * share * down
            factor = tl.where(valid, 1.0, 0.0)
        if WEIGHTED:
            factor = factor * tl.where(valid, weight, 0.0)
        total = write_results(
            total, factor, loss, slope, scale, outer_ptr, outer_row, outer_col,
            loss_ptr, gradient_ptr, gradient_row, gradient_col, tile_r, tile_c, rows, cols,
            LOSS, WHOLE, ALIGN, BLOCK_R, BLOCK_C,
        )
        tile_r, tile_c = next_tile(tile_r, tile_c, step_r, step_c, cols, BLOCK_C)
    if LOSS == "sum":
        tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.ravel(total), axis=0))
# fmt: on


FOCAL = launch.LossOperator(
    *("focal", focal_kernel, "float alpha, float gamma, bool weighted"),
    constants=lambda target, _, alpha, gamma, weighted: {
        "INDEX": target.dim() == 1,
        "WEIGHTED": weighted,
        "ALPHA": alpha,
        "GAMMA": gamma,
    },
    factors="Tensor scale",
)


def weighted_focal(
    inputs: ClassificationInputs, scale: Tensor, focus: Focus, *, weighted: bool, reduce: bool
) -> Tensor:
    """Focal loss times `scale`; the gradient has the dtype and layout of the logits."""
    data = (inputs.logits, inputs.labels, inputs.weight)
    return FOCAL.apply(*data, scale, *focus, weighted, reduce=reduce)
