"""Gradient-harmonized losses for training under extreme imbalance, and what follows from them."""

from ghm_triton.density import GradientDensity
from ghm_triton.functional import focal_loss, ghm_c_loss, ghm_r_loss, gradient_density
from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss
from ghm_triton.schedule import StrengthSchedule
from ghm_triton.statistics import ClassStatistics
from ghm_triton.thresholds import ClassThreshold, ClassThresholds, ThresholdWarning

__version__ = "0.1.0"

__all__ = [
    "ClassStatistics",
    "ClassThreshold",
    "ClassThresholds",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GradientDensity",
    "StrengthSchedule",
    "ThresholdWarning",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "gradient_density",
]
