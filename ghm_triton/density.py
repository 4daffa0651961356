"""Gradient density: the state behind a harmonized loss, and the one place that updates it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghm_triton._inputs import require_bins, require_choice
from ghm_triton.reference.binning import RegionCounts
from ghm_triton.schedule import StrengthSchedule, require_strength

EMAS = ("debiased", "mmdet")
NORMALIZERS = ("valid_bins", "bins")


class GradientDensity(nn.Module):
    """Counts of one batch in, one harmonizing weight a unit region out.

    `beta_j = N / (S_j * n)`, where `S` is the moving average `S <- a S + (1 - a) R` of the
    counts `R` over unit regions of the gradient norm (section 3.3 of arXiv 1811.05181). The
    weight is `beta ** strength`; the strength is this package's own, 1 is the paper.

    Args:
        bins: Unit regions `M`, 1 to 1024.
        momentum: `a` in [0, 1); 0 keeps no average.
        strength: In [0, 1], or a `StrengthSchedule`.
        normalizer: `valid_bins`: `n` counts the regions occupied in this batch (the released
            code); `bins`: `n = M` (the paper).
        ema: `debiased`: the average is divided by `1 - a^t` and empty regions decay. `mmdet`: as
            the released code does, neither.
        max_weight: Upper bound of a weight, or None.
        process_group: Ranks whose counts are summed; None for this process alone.
        device: Where the state is made; None: torch's default.

    The average changes in training mode only. An evaluation-mode call weighs as a training call
    would, and stores nothing. A batch with a non-finite entry, or with no valid entry, leaves the
    state as it was. The state stays float32 when the module is cast: in float16 a count above
    65,504 would be infinite.

    Attributes:
        smoothed: float32 `[M]`, `S`.
        updates: int64 scalar, updates so far; what a strength schedule counts.
    """

    smoothed: Tensor
    updates: Tensor
    strength: Tensor

    def __init__(
        self,
        bins: int,
        momentum: float = 0.0,
        strength: float | StrengthSchedule = 1.0,
        normalizer: str = "valid_bins",
        ema: str = "debiased",
        max_weight: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        self.bins = require_bins(bins)
        self.momentum = float(momentum)
        self.normalizer = require_choice("normalizer", normalizer, NORMALIZERS)
        self.ema = require_choice("ema", ema, EMAS)
        self.max_weight = max_weight
        self.process_group = process_group
        self.schedule = strength if isinstance(strength, StrengthSchedule) else None
        constant = 0.0 if isinstance(strength, StrengthSchedule) else require_strength(strength)
        self.register_buffer("smoothed", torch.zeros(bins, dtype=torch.float32, device=device))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        # A configuration, not a state: it must not come back from an old checkpoint.
        # Filled where it lives: a copy from the host would wait for the device.
        strength_here = torch.full((), constant, dtype=torch.float32, device=device)
        self.register_buffer("strength", strength_here, persistent=False)

    def gather(self, counts: RegionCounts) -> RegionCounts:
        """The counts of every rank of the process group; of this process without one."""
        if self.process_group is None:
            return counts
        # One message: counts are exact in float64 up to 2^53.
        packed = torch.cat(
            [
                counts.regions.double(),
                counts.positives.sum().view(1),
                counts.invalid.double().view(1),
            ]
        )
        dist.all_reduce(packed, group=self.process_group)
        return RegionCounts(packed[:-2].long(), packed[-2:-1], packed[-1].long())

    def world_size(self) -> int:
        """Ranks that share the counts."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def current_strength(self) -> Tensor:
        """The strength of the next call, float32 scalar on the state's device."""
        return self.strength if self.schedule is None else self.schedule.at(self.updates)

    def weigh(
        self,
        counts: RegionCounts,
        kernels: ModuleType,
        divisor: str | None = None,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Weigh the unit regions by `counts`, and in training mode move the average on.

        Args:
            counts: As `gather` returns them.
            kernels: `ghm_triton.ops` or `ghm_triton.reference`.
            divisor: What the loss is divided by: the number of `valid` entries, the sum of the
                `positives`, or None.
            factor: What the loss is multiplied by.

        Returns:
            The weights, float32 `[M]`, and `factor / divisor`, float32 scalar; NaN throughout when
            the batch holds an invalid entry.
        """
        weighed: tuple[Tensor, Tensor] = kernels.update_density(
            counts,
            self.smoothed,
            self.updates,
            self.current_strength(),
            momentum=self.momentum,
            ema=self.ema,
            normalizer=self.normalizer,
            max_weight=self.max_weight,
            persist=self.training,
            divisor=divisor,
            factor=factor,
        )
        return weighed

    def reset(self) -> None:
        """Forget everything seen."""
        self.smoothed.zero_()
        self.updates.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What `to`, `half` and `bfloat16` go through: move with the module, but keep float32.
        before = {name: getattr(self, name) for name in ("smoothed", "strength")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after: Tensor = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, buffer.to(after.device))
        return self

    def extra_repr(self) -> str:
        """The configuration, for `repr`."""
        strength = self.schedule or float(self.strength)
        return (
            f"bins={self.bins}, momentum={self.momentum}, strength={strength}, "
            f"normalizer={self.normalizer!r}, ema={self.ema!r}, max_weight={self.max_weight}"
        )
