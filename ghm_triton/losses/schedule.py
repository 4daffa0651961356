"""Schedules of the strength over the course of training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class StrengthSchedule:
    """A strength that moves from `start` to `end` over the first `steps` updates.

    Args:
        start: Strength at the first update, in [0, 1].
        end: Strength from update `steps` on, in [0, 1].
        steps: Number of updates in between, at least 1. An update is one training-mode call of
            the loss.
        shape: `linear` or `cosine`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> schedule = StrengthSchedule(0.4, 0.0, steps=100)
        >>> float(schedule.at(torch.tensor(50)))
        0.20000000298023224
    """

    start: float
    end: float
    steps: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            require_strength(getattr(self, name), name)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {self.shape!r}")

    def at(self, updates: Tensor) -> Tensor:
        """Return the strength after `updates` updates, integer scalar: float32 scalar."""
        progress = (updates.double() / self.steps).clamp(0.0, 1.0)
        if self.shape == "cosine":
            progress = 0.5 - 0.5 * torch.cos(math.pi * progress)
        return (self.start + (self.end - self.start) * progress).to(torch.float32)


def require_strength(value: float, name: str = "strength") -> float:
    """Return `value` as a float if it lies in [0, 1], or raise ValueError."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    return float(value)
