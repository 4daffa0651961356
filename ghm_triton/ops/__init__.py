"""The kernels in Triton. Every name here has its twin in `ghm_triton.reference`."""

import triton
from triton.runtime.jit import JITFunction

from ghm_triton.ops.binning import count_bce_kernel
from ghm_triton.ops.operators import (
    count_asl1,
    count_bce,
    count_softmax,
    update_density,
    weighted_asl1,
    weighted_bce,
    weighted_focal,
    weighted_softmax,
)
from ghm_triton.reference.binning import RegionCounts

# Triton decides while it defines a function whether to compile or to interpret it. Its own and ours
# must have been defined alike: with the variable set in between, they cannot call each other.
_compiled = [
    isinstance(function, JITFunction) for function in (triton.language.cdiv, count_bce_kernel)
]
COMPILED = all(_compiled)
INTERPRETED = not any(_compiled)

__all__ = [
    "COMPILED",
    "INTERPRETED",
    "RegionCounts",
    "count_asl1",
    "count_bce",
    "count_softmax",
    "update_density",
    "weighted_asl1",
    "weighted_bce",
    "weighted_focal",
    "weighted_softmax",
]
