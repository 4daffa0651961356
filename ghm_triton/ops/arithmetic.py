"""Arithmetic of the kernels for one entry.

Counting and weighing share it, without contraction, so that an entry is weighed by the region that
it is counted in. Each special function is one instruction: `exp2`, `rsqrt` and an approximate
division, where `exp` and an exact one would guard against operands that cannot occur.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ghm_triton.ops.interpreter import interpreting

INTERPRETED = tl.constexpr(interpreting())
LOG2_E = tl.constexpr(1.4426950408889634)

# log(1 + e) / e on [0, 1] with a relative error of 3e-8 (Remez): as exact in float32 as a logarithm
# with an eighth of its instructions, also for small e.
L0 = tl.constexpr(0.9999999403953552)
L1 = tl.constexpr(-0.4999949336051941)
L2 = tl.constexpr(0.3331909775733948)
L3 = tl.constexpr(-0.2484298199415207)
L4 = tl.constexpr(0.19106003642082214)
L5 = tl.constexpr(-0.13663239777088165)
L6 = tl.constexpr(0.07822588086128235)
L7 = tl.constexpr(-0.029505198821425438)
L8 = tl.constexpr(0.005232685245573521)


@triton.jit
def reciprocal(y):
    """`1 / y` for `1 <= y`, up to infinity; exact for 1 and 2."""
    if INTERPRETED:  # the interpreter has no device library
        inverse = 1.0 / y
    else:
        inverse = libdevice.fast_dividef(1.0, y)
    return inverse


@triton.jit
def log1p(e):
    """`log(1 + e)` for `0 <= e <= 1`."""
    series = tl.fma(e, L8, L7)
    series = tl.fma(e, series, L6)
    series = tl.fma(e, series, L5)
    series = tl.fma(e, series, L4)
    series = tl.fma(e, series, L3)
    series = tl.fma(e, series, L2)
    series = tl.fma(e, series, L1)
    series = tl.fma(e, series, L0)
    return e * series


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`; the exponential may be infinite, and nothing cancels."""
    return reciprocal(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def bce_slope(x, target, INDEX: tl.constexpr):
    """`p - p*`; with class indices `target` is a boolean.

    `u = (1 - 2 p*) x` has `g = sigmoid(u)`, so that a positive's gradient does not cancel.
    """
    if INDEX:
        norm = sigmoid(tl.where(target, -x, x))
        slope = tl.where(target, -norm, norm)
    else:
        slope = sigmoid(x) - target
    return slope


@triton.jit
def bce(x, target, INDEX: tl.constexpr):
    """Binary cross entropy."""
    if INDEX:
        linear = tl.maximum(tl.where(target, -x, x), 0.0)
    else:
        linear = tl.maximum(x, 0.0) - x * target
    return linear + log1p(tl.exp2(tl.abs(x) * -LOG2_E))


@triton.jit
def asl1(d, MU: tl.constexpr):
    """`sqrt(d^2 + mu^2) - mu` and its slope `d / sqrt(d^2 + mu^2)`.

    In units of `mu`, and without squaring what would overflow: far out the slope is 1.
    """
    size = tl.abs(d)
    units = tl.minimum(size * (1.0 / MU), 1e15)
    square = 1.0 + units * units
    inverse = tl.rsqrt(square)
    slope = units * inverse
    # sqrt(d^2 + mu^2) - mu loses every digit when d << mu; this form keeps them.
    loss = size * (units * reciprocal(1.0 + square * inverse))
    return loss, tl.where(d < 0.0, -slope, slope)


@triton.jit
def unit_region(norm, BINS: tl.constexpr):
    """Return the region of a norm; `g = 1` belongs to the last one.

    Unsigned, so that the compiler sees the bounds and a histogram need not check them.
    """
    return tl.minimum((norm * BINS).to(tl.uint32), BINS - 1)
