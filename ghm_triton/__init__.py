"""Gradient-harmonized losses for object detection, and thresholds from training statistics."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ghm_triton.extras import needed_by

if TYPE_CHECKING:
    from ghm_triton.evidence import (
        ClassStatistics,
        ClassThreshold,
        ClassThresholds,
        ThresholdWarning,
    )
    from ghm_triton.imbalance.ohem import OHEM, StratifiedOHEM, hard_examples
    from ghm_triton.imbalance.sampling_free import (
        GuidedLoss,
        guided,
        initial_loss,
        optimal_prior,
    )
    from ghm_triton.losses import (
        FocalLoss,
        GHMCLoss,
        GHMRLoss,
        GHMSoftmaxLoss,
        focal_loss,
        ghm_c_loss,
        ghm_r_loss,
        ghm_softmax_loss,
        gradient_density,
    )
    from ghm_triton.losses.density import GradientDensity
    from ghm_triton.losses.schedule import StrengthSchedule

__version__ = "0.1.0"

# Names are imported at first use: the service and the client import this package without torch.
_HOMES = {
    name: module
    for module, names in {
        "evidence": "ClassStatistics ClassThreshold ClassThresholds ThresholdWarning",
        "imbalance.ohem": "OHEM StratifiedOHEM hard_examples",
        "imbalance.sampling_free": "GuidedLoss guided initial_loss optimal_prior",
        "losses": "FocalLoss GHMCLoss GHMRLoss GHMSoftmaxLoss GradientDensity StrengthSchedule"
        " focal_loss ghm_c_loss ghm_r_loss ghm_softmax_loss gradient_density",
    }.items()
    for name in names.split()
}

__all__ = [
    "OHEM",
    "ClassStatistics",
    "ClassThreshold",
    "ClassThresholds",
    "FocalLoss",
    "GHMCLoss",
    "GHMRLoss",
    "GHMSoftmaxLoss",
    "GradientDensity",
    "GuidedLoss",
    "StratifiedOHEM",
    "StrengthSchedule",
    "ThresholdWarning",
    "focal_loss",
    "ghm_c_loss",
    "ghm_r_loss",
    "ghm_softmax_loss",
    "gradient_density",
    "guided",
    "hard_examples",
    "initial_loss",
    "optimal_prior",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ghm_triton' has no attribute {name!r}")
    home = _HOMES[name]
    with needed_by(f"ghm_triton.{name}", "evidence" if home == "evidence" else "loss"):
        return getattr(import_module(f"ghm_triton.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
