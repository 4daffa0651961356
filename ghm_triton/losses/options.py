"""What the losses have in common: their options, and the density that weighs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ghm_triton.losses.density import GradientDensity
from ghm_triton.losses.inputs import require_choice
from ghm_triton.losses.schedule import StrengthSchedule

Reduction = Literal["mean", "sum", "none"]
Average = Literal["valid", "positives"]
Backend = Literal["auto", "triton", "torch"]

REDUCTIONS = ("mean", "sum", "none")
AVERAGES = ("valid", "positives")
DEFAULT_STRENGTH = 0.25  # docs/study.md says why; the paper is 1


def density_for(
    state: GradientDensity | None,
    bins: int,
    strength: float | StrengthSchedule,
    density: str,
    normalizer: str,
    max_weight: float | None,
    like: Tensor,
) -> GradientDensity:
    """The state that was given, or a new one that keeps no average.

    Raises:
        ValueError: The state is on another device, or an option does not fit.
    """
    if state is None:
        return GradientDensity(
            bins,
            strength=strength,
            normalizer=normalizer,
            max_weight=max_weight,
            device=like.device,
            density=density,
        )
    if state.smoothed.device != like.device:
        raise ValueError(
            f"the loss keeps its state on {state.smoothed.device}, the predictions are on"
            f" {like.device}: move the loss with .to({str(like.device)!r})"
        )
    return state


def mean_of(
    reduction: str, average: str, loss_weight: float, density: GradientDensity
) -> tuple[str | None, float]:
    """What the sum is divided by and what it is multiplied by.

    Ranks average their gradients, so each rank's share of a mean is multiplied by their number.
    """
    if reduction != "mean":
        return None, loss_weight
    return average, loss_weight * density.world_size()


def require_reduction(reduction: str, average: str) -> None:
    """Raise ValueError unless both are known."""
    require_choice("reduction", reduction, REDUCTIONS)
    require_choice("average", average, AVERAGES)
