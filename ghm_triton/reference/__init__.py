"""The kernels' arithmetic in plain torch: the executable specification, and the CPU path.

Every name here has its twin in `ghm_triton.ops` with the same signature.
"""

from ghm_triton.reference.asl1 import weighted_asl1
from ghm_triton.reference.bce import weighted_bce
from ghm_triton.reference.binning import RegionCounts, count_asl1, count_bce
from ghm_triton.reference.density import update_density
from ghm_triton.reference.focal import weighted_focal
from ghm_triton.reference.softmax import count_softmax, weighted_softmax

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
