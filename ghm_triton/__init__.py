"""Gradient-harmonized losses for training under extreme imbalance, and what follows from them."""

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
    from ghm_triton.imbalance.ohem import OHEM, hard_examples
    from ghm_triton.imbalance.s_ohem import StratifiedOHEM
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
    "ClassStatistics": "evidence",
    "ClassThreshold": "evidence",
    "ClassThresholds": "evidence",
    "FocalLoss": "losses",
    "GHMCLoss": "losses",
    "GHMRLoss": "losses",
    "GHMSoftmaxLoss": "losses",
    "GradientDensity": "losses",
    "GuidedLoss": "imbalance.sampling_free",
    "OHEM": "imbalance.ohem",
    "StratifiedOHEM": "imbalance.s_ohem",
    "StrengthSchedule": "losses",
    "ThresholdWarning": "evidence",
    "focal_loss": "losses",
    "ghm_c_loss": "losses",
    "ghm_r_loss": "losses",
    "ghm_softmax_loss": "losses",
    "gradient_density": "losses",
    "guided": "imbalance.sampling_free",
    "hard_examples": "imbalance.ohem",
    "initial_loss": "imbalance.sampling_free",
    "optimal_prior": "imbalance.sampling_free",
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
