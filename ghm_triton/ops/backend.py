"""The Triton kernels as an implementation of `ghm_triton.reference.interface.Kernels`."""

import triton
from triton.runtime.jit import JITFunction

from ghm_triton.ops.asl1 import count_asl1, weighted_asl1
from ghm_triton.ops.bce import count_bce, count_bce_kernel, weighted_bce
from ghm_triton.ops.density import update_density
from ghm_triton.ops.focal import weighted_focal
from ghm_triton.ops.softmax import count_softmax, weighted_softmax

__all__ = [
    "COMPILED",
    "INTERPRETED",
    "count_asl1",
    "count_bce",
    "count_softmax",
    "update_density",
    "weighted_asl1",
    "weighted_bce",
    "weighted_focal",
    "weighted_softmax",
]

# Triton decides when it defines a function whether to compile or to interpret it. Its functions and
# those of this package must have been defined alike: with the variable set in between, they cannot
# call each other.
_compiled = [
    isinstance(function, JITFunction) for function in (triton.language.cdiv, count_bce_kernel)
]
COMPILED = all(_compiled)
INTERPRETED = not any(_compiled)
