"""The losses: each a function without state, and a module that keeps a moving average."""

from ghm_triton.losses.density import DEFAULT_STRENGTH, GradientDensity, gradient_density
from ghm_triton.losses.focal import FocalLoss, focal_loss
from ghm_triton.losses.ghm_c import GHMCLoss, ghm_c_loss
from ghm_triton.losses.ghm_r import GHMRLoss, ghm_r_loss
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.losses.softmax import GHMSoftmaxLoss, ghm_softmax_loss

__all__ = [
    "DEFAULT_STRENGTH",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GHMSoftmaxLoss",
    "GradientDensity",
    "StrengthSchedule",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ghm_softmax_loss",
    "gradient_density",
]
