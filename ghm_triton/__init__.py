"""Gradient-harmonized losses for training under extreme imbalance, and what follows from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghm_triton.density import GradientDensity
    from ghm_triton.functional import (
        focal_loss,
        ghm_c_loss,
        ghm_r_loss,
        ghm_softmax_loss,
        gradient_density,
    )
    from ghm_triton.losses import FocalLoss, GHMCLoss, GHMRLoss, GHMSoftmaxLoss
    from ghm_triton.schedule import StrengthSchedule
    from ghm_triton.statistics import ClassStatistics
    from ghm_triton.thresholds import ClassThreshold, ClassThresholds, ThresholdWarning

__version__ = "0.1.0"

# Names are imported when they are first used, so that `ghm serve`, which starts here too, never
# loads torch.
_HOMES = {
    "ClassStatistics": "statistics",
    "ClassThreshold": "thresholds",
    "ClassThresholds": "thresholds",
    "FocalLoss": "losses",
    "GHMCLoss": "losses",
    "GHMRLoss": "losses",
    "GHMSoftmaxLoss": "losses",
    "GradientDensity": "density",
    "StrengthSchedule": "schedule",
    "ThresholdWarning": "thresholds",
    "focal_loss": "functional",
    "ghm_c_loss": "functional",
    "ghm_r_loss": "functional",
    "ghm_softmax_loss": "functional",
    "gradient_density": "functional",
}

__all__ = [
    "ClassStatistics",
    "ClassThreshold",
    "ClassThresholds",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GHMSoftmaxLoss",
    "GradientDensity",
    "StrengthSchedule",
    "ThresholdWarning",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ghm_softmax_loss",
    "gradient_density",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghm_triton' has no attribute {name!r}")
    return getattr(import_module(f"ghm_triton.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
