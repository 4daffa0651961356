"""What the options say of a two-stage detector: its proposals' loss, its regions' adversary."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch.distributed import ProcessGroup

from ghm_triton.imbalance.adversarial import Adversary
from ghm_triton.losses import GHMCLoss
from ghm_triton.losses.schedule import StrengthSchedule

if TYPE_CHECKING:
    from ghm_triton.detection.recipe import TrainOptions


def objectness_loss(
    options: TrainOptions,
    strength: float | StrengthSchedule,
    group: ProcessGroup | None,
    architecture: str,
    assigner: str,
) -> GHMCLoss | None:
    """GHM-C of a proposal network that learns from every anchor; None for one that samples.

    Whatever the regions' classification learns by: without sampling, balance is its to keep.
    """
    if assigner != "cleanliness" or architecture != "faster-rcnn":
        return None
    return GHMCLoss(
        bins=options.bins,
        strength=strength,
        average=options.average,  # type: ignore[arg-type]
        process_group=group,
    )


def adversary_maker(options: TrainOptions, architecture: str) -> Callable[[int], Adversary] | None:
    """What makes the adversary that the options name, given the channels of pooled features.

    Raises:
        ValueError: The detector has no regions.
    """
    if options.adversarial == "none":
        return None
    if architecture != "faster-rcnn":
        raise ValueError(
            f"adversarial must be none for {architecture}, which looks once: an adversary hides"
            f" and turns the pooled features of regions; got {options.adversarial!r}"
        )
    start = round(options.adversarial_start * options.steps)
    return partial(Adversary, kind=options.adversarial, start=start)
