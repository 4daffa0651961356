"""The losses as functions: validate, count, weigh, sum."""

from ghm_triton.functional.density import gradient_density
from ghm_triton.functional.focal import focal_loss
from ghm_triton.functional.ghm_c import ghm_c_loss
from ghm_triton.functional.ghm_r import ghm_r_loss
from ghm_triton.functional.options import DEFAULT_STRENGTH
from ghm_triton.functional.softmax import ghm_softmax_loss

__all__ = [
    "DEFAULT_STRENGTH",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ghm_softmax_loss",
    "gradient_density",
]
