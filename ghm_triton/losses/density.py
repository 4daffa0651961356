"""Gradient density: the counts by unit region, their moving average, and the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ghm_triton.losses.inputs import require_bins, require_choice
from ghm_triton.losses.schedule import StrengthSchedule, require_strength
from ghm_triton.reference.density import (
    fine_regions,
    stream_density,
    update_density,
    window_density,
)
from ghm_triton.reference.interface import DensityOptions, DensityState, Kernels, RegionCounts
from ghm_triton.reference.losses import compute_dtype, unit_region
from ghm_triton.state import SharedState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Density = Literal["unit_region", "exact", "streaming"]

DEFAULT_STRENGTH = 0.25  # measured in docs/study.md; the paper's is 1
EMAS = ("debiased", "mmdet")
NORMALIZERS = ("valid_bins", "bins")
DENSITIES = ("unit_region", "exact", "streaming")


class GradientDensity(SharedState):
    r"""Gradient density of a harmonized loss: from the counts of a batch to weights.

    $$ S_j \leftarrow a S_j + (1 - a) R_j, \quad \beta_j = \frac{N}{S_j \, n} $$

    `R` are the counts over unit regions of the gradient norm (section 3.3 of arXiv 1811.05181). The
    weight is `beta ** strength`; the strength is an addition, 1 is the paper's.

    With `density="exact"` a window of width `1 / M` slides over the norms of the batch, as the
    paper defines the density, and each entry has its own weight. The norms are sorted:
    `O(N log N)`, with about 30 bytes per entry of scratch memory. There is no average, so
    `momentum`, `ema` and `normalizer` are not used; `smoothed` is one number, the valid entries of
    the last batch, and `updates` advances the schedule.

    `density="streaming"` computes the same window from the counts of fine regions, which are
    averaged over batches and ranks: `beta_j = N / GD_j`, one weight per fine region.
    `stream_density` bounds its difference from `exact`. There is no `n`, so `normalizer` is not
    used.

    Args:
        bins: Number of unit regions `M`, 1 to 1024; up to 341 for `streaming`. The window is
            `1 / M` wide.
        momentum: `a` in [0, 1); 0 keeps no average.
        strength: In [0, 1], or a `StrengthSchedule`.
        normalizer: `valid_bins`: `n` is the number of regions occupied in this batch (released
            code); `bins`: `n = M` (the paper).
        ema: `debiased`: the average is divided by `1 - a^t` and empty regions decay; `mmdet`:
            neither (released code).
        max_weight: Upper bound of a weight, or None.
        process_group: Ranks whose counts are summed, see below; None for this process alone. Not
            for `exact`.
        device: Of the state; None: torch's default.
        density: `unit_region`, `exact` or `streaming`.

    The average changes in training mode only; in evaluation mode a call computes the same weights
    and stores nothing. A batch with a non-finite entry, or without valid entries, does not change
    the state. The state stays float32 when the module is cast: in float16 a count above 65,504
    would be infinite.

    With a `process_group` of `R` ranks, each with a share of the batch, every rank uses the counts
    of the whole batch and keeps the same average. `mean` assumes that gradients are averaged over
    ranks, as `DistributedDataParallel` and FSDP do: the mean of the losses is the loss of one
    process with the whole batch, to rounding. `sum` and `none` cover the rank's own share: their
    sum over ranks is that of one process, so averaged gradients are divided by `R`.

    - The group is the one over which the batch is split: `torch.distributed.group.WORLD`, or
      `mesh["dp"].get_group()` where a mesh has other dimensions.
    - A call is a collective operation, in evaluation mode too: every rank makes the same calls in
      the same order, a rank without samples with empty tensors. A non-finite value on one rank
      makes the loss NaN on all; an error (a label out of range) is raised on its own rank only, and
      the others hang as after any missed collective.
    - The module may be inside `DistributedDataParallel`, which broadcasts rank 0's buffers before
      every forward pass: with a group they are equal already, without one rank 0's replace them.
    - It may be inside `fully_shard` (FSDP2) too. Buffers are neither sharded nor cast: counts stay
      float32 under any `MixedPrecisionPolicy`. A model made on the meta device needs
      `reset_parameters` after `to_empty`, as its other layers do.
    - A copy (`copy.deepcopy`, `torch.optim.swa_utils.AveragedModel`) shares the group.

    Attributes:
        method: The `density` argument.
        regions: Number of regions counted: `M`; 1 for `exact`; `M K` for `streaming`, at most
            1024, with `K` odd.
        smoothed: float32 `[regions]`, `S`.
        updates: int64 scalar, the number of updates, which a strength schedule follows.

    Raises:
        ValueError: An option is invalid.

    Example:
        >>> from ghm_triton import GHMCLoss, GradientDensity, ghm_c_loss
        >>> density = GradientDensity(bins=10, momentum=0.75)
        >>> loss = ghm_c_loss(torch.zeros(4, 3), torch.tensor([0, 1, 2, 3]), state=density)
        >>> int(density.updates)
        1
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
        # Configuration, not state: it must not be restored from an old checkpoint. Filled on its
        # device: a copy from the host would synchronise.
        constant = torch.full((), self._constant, dtype=torch.float32, device=device)
        self.register_buffer("strength", constant, persistent=False)

    def gather(self, counts: RegionCounts) -> RegionCounts:
        """Sum the counts over the process group, if there is one."""
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
        """Return the number of ranks that share the counts."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    def current_strength(self) -> Tensor:
        """Return the strength of the next call, float32 scalar on the state's device."""
        return self.strength if self.schedule is None else self.schedule.at(self.updates)

    def weigh(
        self,
        counts: RegionCounts,
        kernels: Kernels,
        divisor: str | None = None,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Compute the weights of the unit regions, and in training mode update the average.

        Args:
            counts: As returned by `gather`.
            kernels: The implementation that counted.
            divisor: Divides the loss: the number of `valid` entries, the sum of the `positives`, or
                None.
            factor: Multiplies the loss.

        Returns:
            The weights, float32 `[regions]`, and `factor / divisor`, float32 scalar; all NaN when
            the batch has an invalid entry. With `exact` the weight is 1, as entries are weighed
            one by one.
        """
        state = DensityState(self.smoothed, self.updates, self.current_strength())
        average = (self.momentum, self.ema, self.normalizer, self.max_weight)
        options = DensityOptions(*average, self.training, divisor, factor)
        if self.method == "streaming":
            return update_density(counts, state, options, window=self.bins)
        if self.method == "exact":
            # One region, of weight 1, without an average: entries have their own weights.
            options = options._replace(momentum=0.0, ema="debiased", max_weight=None)
        return kernels.update_density(counts, state, options)

    def reset(self) -> None:
        """Reset the average and the number of updates."""
        self.smoothed.zero_()
        self.updates.zero_()

    def reset_parameters(self) -> None:
        """Initialise every buffer, as needed after `to_empty`."""
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
        reports = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)
        saved = state_dict.get(prefix + "smoothed")
        if saved is not None and saved.shape != self.smoothed.shape:
            error_msgs.append(
                f"{prefix}smoothed counts {len(self.smoothed)} regions here (bins={self.bins},"
                f" density={self.method!r}) and {saved.numel()} in the checkpoint: it was saved"
                " with other bins or another density"
            )

    def plot(self) -> Figure:
        """Draw entries, weights and shares of the gradient by region.

        Synchronises with a GPU; needs matplotlib (`ghm-triton[train]`).

        Returns:
            A matplotlib figure.

        Raises:
            ValueError: The density is exact, or has counted nothing yet.
        """
        from ghm_triton.diagnosis import plot_density

        return plot_density(self)

    def problems(self) -> list[str]:
        """Diagnose bins that are too thin and weights that explode, with remedies.

        The losses do not call it, because it synchronises with a GPU; `ghm train` does, and warns
        once.
        """
        from ghm_triton.diagnosis import problems_of

        return problems_of(self)

    def extra_repr(self) -> str:
        """Format the configuration for `repr`."""
        strength = self.schedule or self._constant
        return (
            f"bins={self.bins}, momentum={self.momentum}, strength={strength}, "
            f"normalizer={self.normalizer!r}, ema={self.ema!r}, max_weight={self.max_weight}, "
            f"density={self.method!r}"
        )


def count_regions(bins: int, density: str) -> int:
    """Return the number of regions that `density` counts for `bins`.

    Raises:
        ValueError: `bins` is too large for `streaming`.
    """
    if density == "streaming":
        return fine_regions(bins)
    return 1 if density == "exact" else bins


def gradient_density(
    gradient_norm: Tensor, bins: int = 30, density: Density = "unit_region"
) -> Tensor:
    """Compute the density of each entry: the entries near it, by the width of the neighbourhood.

    Args:
        gradient_norm: `g` in [0, 1], any shape, floating.
        bins: `M`, 1 to 1024; up to 341 for `streaming`.
        density: `unit_region`: `R_ind(g) * M` (equation 8 of arXiv 1811.05181); `exact`: a window
            of width `1 / M` about the entry, as the paper defines it, `O(N log N)`; `streaming`:
            that window from fine regions, within the bound of `stream_density`.

    Returns:
        float32 of the same shape: entries per unit of gradient norm.

    Raises:
        TypeError: The input is not floating.
        ValueError: A value lies outside [0, 1] or is NaN (checked on the CPU only); or an option is
            invalid.

    Example:
        >>> import torch
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
