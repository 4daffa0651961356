"""The specification of every loss in plain torch.

One tensor operation after another over the whole batch, without looking at a value, so that it can
be traced. It runs on every device and in every dtype, under `torch.compile`, `torch.export`,
`torch.func` and forward-mode differentiation, and can be differentiated any number of times.
"""

from ghm_triton.reference.density import update_density
from ghm_triton.reference.interface import RegionCounts
from ghm_triton.reference.losses import (
    count_asl1,
    count_bce,
    count_softmax,
    weighted_asl1,
    weighted_bce,
    weighted_focal,
    weighted_softmax,
)

__all__ = [
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
