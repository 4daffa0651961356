"""Gradient density: the state behind a harmonized loss, and the one place that updates it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor

from ghm_triton.losses.inputs import require_bins, require_choice
from ghm_triton.losses.schedule import StrengthSchedule, require_strength
from ghm_triton.reference.binning import compute_dtype, unit_region
from ghm_triton.reference.density import fine_regions, stream_density, update_window
from ghm_triton.reference.exact import window_density
from ghm_triton.reference.interface import Kernels, RegionCounts
from ghm_triton.state import SharedState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Density = Literal["unit_region", "exact", "streaming"]

DEFAULT_STRENGTH = 0.25  # measured in docs/study.md; the paper's is 1
EMAS = ("debiased", "mmdet")
NORMALIZERS = ("valid_bins", "bins")
DENSITIES = ("unit_region", "exact", "streaming")


class GradientDensity(SharedState):
    """Counts of one batch in, one harmonizing weight a unit region out.

    `beta_j = N / (S_j * n)`, where `S` is the moving average `S <- a S + (1 - a) R` of the
    counts `R` over unit regions of the gradient norm (section 3.3 of arXiv 1811.05181). The
    weight is `beta ** strength`; the strength is this package's own, 1 is the paper.

    With `density="exact"` a window of width `1 / M` slides over the norms of the batch, as the
    paper defines the density, and every entry has a weight of its own. The norms are sorted:
    `O(N log N)`, about 30 bytes an entry while it runs. There is no average, so `momentum`, `ema`
    and `normalizer` are not used; `smoothed` is one number, the valid entries of the last batch,
    and `updates` counts for the schedule as ever.

    `density="streaming"` finds the same window from the counts of fine regions, which are averaged
    over batches and ranks: `beta_j = N / GD_j`, one weight a fine region. `stream_density` states
    how far it is from exact. `normalizer` is not used, as there is no `n`.

    Args:
        bins: Unit regions `M`, 1 to 1024; up to 341 for `streaming`. The window is `1 / M` wide.
        momentum: `a` in [0, 1); 0 keeps no average.
        strength: In [0, 1], or a `StrengthSchedule`.
        normalizer: `valid_bins`: `n` counts the regions occupied in this batch (the released
            code); `bins`: `n = M` (the paper).
        ema: `debiased`: the average is divided by `1 - a^t` and empty regions decay. `mmdet`: as
            the released code does, neither.
        max_weight: Upper bound of a weight, or None.
        process_group: Ranks whose counts are summed, see below; None for this process alone. Not
            for `exact`.
        device: Where the state is made; None: torch's default.
        density: `unit_region`, `exact` or `streaming`.

    The average changes in training mode only. An evaluation-mode call weighs as a training call
    would, and stores nothing. A batch with a non-finite entry, or with no valid entry, leaves the
    state as it was. The state stays float32 when the module is cast: in float16 a count above
    65,504 would be infinite.

    With a `process_group` of `R` ranks, each with a share of the batch, every rank weighs by the
    counts of the whole batch and keeps the same average. `mean` is made for gradients that are
    averaged over ranks, as `DistributedDataParallel` and FSDP do: the mean of the losses is the
    loss of one process with the whole batch, to rounding. `sum` and `none` belong to the rank's own
    share: their sum over ranks is that of one process, so what averages gradients divides them by
    `R`.

    - The group is the one over which the batch is split: `torch.distributed.group.WORLD`, or
      `mesh["dp"].get_group()` where a mesh has other dimensions.
    - A call is a collective operation, in evaluation mode too: every rank makes the same calls in
      the same order, a rank without samples with empty tensors. What is not finite on one rank
      makes the loss NaN on all; an error (a label out of range) is raised on its own rank only, and
      leaves the others waiting as any missed collective does.
    - The module may lie inside `DistributedDataParallel`, which hands out rank 0's buffers before
      every forward pass: they are equal already. Without a group they are not, and rank 0's win.
    - Under `fully_shard` (FSDP2) it may lie inside too. Buffers are neither sharded nor cast:
      counts stay float32 under any `MixedPrecisionPolicy`. A model made on the meta device needs
      `reset_parameters` after `to_empty`, as its other layers do.
    - A copy (`copy.deepcopy`, `torch.optim.swa_utils.AveragedModel`) shares the group.

    Attributes:
        method: What was given for `density`.
        regions: How many regions are counted: `M`; 1 for `exact`; `M K` for `streaming`, at most
            1024, with `K` odd.
        smoothed: float32 `[regions]`, `S`.
        updates: int64 scalar, updates so far; what a strength schedule counts.
    """

    FLOAT32 = ("smoothed", "strength")
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
        density: str = "unit_region",
    ) -> None:
        super().__init__(process_group)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        self.bins = require_bins(bins)
        self.method = require_choice("density", density, DENSITIES)
        if density == "exact" and process_group is not None:
            raise ValueError(
                "density='exact' would need the norms of every rank and takes no process_group;"
                " density='streaming' does"
            )
        self.regions = count_regions(bins, density)
        self.momentum = float(momentum)
        self.normalizer = require_choice("normalizer", normalizer, NORMALIZERS)
        self.ema = require_choice("ema", ema, EMAS)
        self.max_weight = max_weight
        self.schedule = strength if isinstance(strength, StrengthSchedule) else None
        self._constant = (
            0.0 if isinstance(strength, StrengthSchedule) else require_strength(strength)
        )
        self.register_buffer(
            "smoothed", torch.zeros(self.regions, dtype=torch.float32, device=device)
        )
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=device))
        # A configuration, not a state: it must not come back from an old checkpoint.
        # Filled where it lives: a copy from the host would wait for the device.
        strength_here = torch.full((), self._constant, dtype=torch.float32, device=device)
        self.register_buffer("strength", strength_here, persistent=False)

    @classmethod
    def without_average(
        cls,
        bins: int,
        strength: float | StrengthSchedule,
        normalizer: str,
        max_weight: float | None,
        device: torch.device,
        density: str,
    ) -> Self:
        """Make the density of a single call."""
        return cls(bins, 0.0, strength, normalizer, "debiased", max_weight, None, device, density)

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
        kernels: Kernels,
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
            The weights, float32 `[regions]`, and `factor / divisor`, float32 scalar; NaN
            throughout when the batch holds an invalid entry. With `exact` the weight is 1: it is
            the entries that are weighed.
        """
        given = (counts, self.smoothed, self.updates, self.current_strength())
        update = self._update(kernels)
        return update(*given, persist=self.training, divisor=divisor, factor=factor)

    def _update(self, kernels: Kernels) -> Callable[..., tuple[Tensor, Tensor]]:
        average: dict[str, Any]
        average = {"momentum": self.momentum, "ema": self.ema, "max_weight": self.max_weight}
        if self.method == "streaming":
            return partial(update_window, bins=self.bins, **average)
        if self.method == "exact":
            # One region, of weight 1, that keeps no average: the entries have their own weights.
            average = {"momentum": 0.0, "ema": "debiased", "max_weight": None}
        return partial(kernels.update_density, normalizer=self.normalizer, **average)

    def reset(self) -> None:
        """Forget everything seen."""
        self.smoothed.zero_()
        self.updates.zero_()

    def reset_parameters(self) -> None:
        """Fill every buffer anew, as after `to_empty`: `reset`, and the strength as configured."""
        self.reset()
        self.strength.fill_(self._constant)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = (state_dict, prefix, local_metadata, strict)
        super()._load_from_state_dict(*given, missing_keys, unexpected_keys, error_msgs)
        saved = state_dict.get(prefix + "smoothed")
        if saved is not None and saved.shape != self.smoothed.shape:
            error_msgs.append(
                f"{prefix}smoothed counts {len(self.smoothed)} regions here (bins={self.bins},"
                f" density={self.method!r}) and {saved.numel()} in the checkpoint: it was saved"
                " with other bins or another density"
            )

    def plot(self) -> Figure:
        """Draw what was counted: entries, weights and shares of the gradient by region.

        Waits for a GPU; needs matplotlib (`ghm-triton[train]`).

        Returns:
            A matplotlib figure, which a notebook shows and `savefig` writes.

        Raises:
            ValueError: The density is exact, or has counted nothing yet.
        """
        from ghm_triton.diagnosis import plot_density

        return plot_density(self)

    def problems(self) -> list[str]:
        """What ails the density (bins too thin, weights that explode), with the remedy.

        Not looked for by the losses themselves, because it waits for a GPU; `ghm train` asks, and
        warns once.
        """
        from ghm_triton.diagnosis import problems_of

        return problems_of(self)

    def extra_repr(self) -> str:
        """The configuration, for `repr`."""
        strength = self.schedule or self._constant
        return (
            f"bins={self.bins}, momentum={self.momentum}, strength={strength}, "
            f"normalizer={self.normalizer!r}, ema={self.ema!r}, max_weight={self.max_weight}, "
            f"density={self.method!r}"
        )


def count_regions(bins: int, density: str) -> int:
    """How many regions `density` counts for `bins`.

    Raises:
        ValueError: `bins` is too large for `streaming`.
    """
    if density == "streaming":
        return fine_regions(bins)
    return 1 if density == "exact" else bins


def gradient_density(
    gradient_norm: Tensor, bins: int = 30, density: Density = "unit_region"
) -> Tensor:
    """The density of each entry among all: how many share its neighbourhood, by its width.

    Args:
        gradient_norm: `g` in [0, 1], any shape, floating.
        bins: `M`, 1 to 1024; up to 341 for `streaming`.
        density: `unit_region`: `R_ind(g) * M` (equation 8 of arXiv 1811.05181); `exact`: a window
            of width `1 / M` about the entry, as the paper defines it, `O(N log N)`; `streaming`:
            that window from fine regions, within the bound that `stream_density` states.

    Returns:
        float32 of the same shape: entries per unit of gradient norm.

    Raises:
        TypeError: The input is not floating.
        ValueError: A value lies outside [0, 1] or is NaN (looked at on the CPU only); or an option
            does not fit.

    Example:
        >>> gradient_density(torch.tensor([0.01, 0.02, 0.9]), bins=10)
        tensor([20., 20., 10.])
        >>> gradient_density(torch.tensor([0.01, 0.05, 0.9]), bins=10, density="exact")
        tensor([33.3333, 20.0000, 10.0000])
    """
    require_bins(bins)
    require_choice("density", density, DENSITIES)
    regions = count_regions(bins, density)
    if not gradient_norm.is_floating_point():
        raise TypeError(f"gradient_norm must be floating, got {gradient_norm.dtype}")
    if gradient_norm.device.type == "cpu" and gradient_norm.numel():
        low, high = (float(bound) for bound in torch.aminmax(gradient_norm))
        if not (low >= 0 and high <= 1):
            raise ValueError(f"gradient_norm must lie in [0, 1]; got {low:g} to {high:g}")
    norm = gradient_norm.detach().to(compute_dtype(gradient_norm))
    if density == "exact":
        return window_density(norm, bins).float()
    region = unit_region(norm, regions).flatten()
    counts = torch.zeros(regions, dtype=torch.int64, device=region.device)
    counts.scatter_add_(0, region, torch.ones_like(region))
    table = counts * bins if density == "unit_region" else stream_density(counts.double(), bins)
    return table[region].float().view(gradient_norm.shape)
