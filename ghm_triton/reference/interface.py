"""The interface of the implementations of the losses: inputs, results and `Kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassificationInputs:
    """Logits and targets as rows: one row per sample, one column per class.

    Attributes:
        logits: `[R, C]`.
        index: int64 `[R]`, `C` background, negative ignored; None with dense targets.
        target: `[R, C]` in [0, 1]; None with index targets.
        weight: `[R, C]`, 0 ignores; None keeps everything. May be a view with strides of 0.
        shape: Of the logits before they were viewed as rows.
    """

    logits: Tensor
    index: Tensor | None
    target: Tensor | None
    weight: Tensor | None
    shape: torch.Size

    @property
    def labels(self) -> Tensor:
        """The class indices, or the dense targets."""
        return self.target if self.index is None else self.index  # type: ignore[return-value]


@dataclass(frozen=True)
class RegressionInputs:
    """Predictions and targets `[R, C]`, `weight` `[R, C]` or None, and the original shape.

    `mu` is the width of the quadratic part of authentic smooth L1.
    """

    pred: Tensor
    target: Tensor
    weight: Tensor | None
    shape: torch.Size
    mu: float


@dataclass(frozen=True)
class SoftmaxInputs:
    """Logits `[R, C]`, class indices int64 `[R]` (negative ignored), `weight` `[R]` or None.

    `shape` is the original shape of the indices.
    """

    logits: Tensor
    index: Tensor
    weight: Tensor | None
    shape: torch.Size


class Focus(NamedTuple):
    """Options of focal loss: the weight `alpha` of positives and the exponent `gamma`."""

    alpha: float
    gamma: float


class RegionCounts(NamedTuple):
    """Counts of one batch.

    Attributes:
        regions: int64 `[M]`: `R_j`, the valid entries in each unit region, without those counted
            by `invalid`.
        positives: float64 `[P]`, partial sums of the targets over valid entries; for hard targets
            their sum is the number of positives.
        invalid: int64 scalar: valid entries whose logit is not finite or whose target is out of
            range. More than zero makes the loss NaN.
    """

    regions: Tensor
    positives: Tensor
    invalid: Tensor


class DensityState(NamedTuple):
    """State of a gradient density.

    Attributes:
        smoothed: float32 `[M]`, the moving average `S` of the counts as stored.
        updates: int64 scalar, the number of updates so far.
        strength: float32 scalar in [0, 1]: the weight is `beta ** strength`.
    """

    smoothed: Tensor
    updates: Tensor
    strength: Tensor


class DensityOptions(NamedTuple):
    """How counts become weights and the scale of the sum.

    Attributes:
        momentum: `a` in [0, 1): `S <- a S + (1 - a) R`; 0 keeps no average.
        ema: `debiased`: divide by `1 - a^t`, empty regions decay. `mmdet`: no correction, empty
            regions keep their value.
        normalizer: `valid_bins`: `n` is the number of regions occupied in this batch; `bins`: `M`.
        max_weight: Upper bound of a weight, or None.
        persist: Whether to store the new average in place. A batch without valid entries, or with
            an invalid one, is never stored.
        divisor: Divisor of the sum, at least 1: the number of `valid` entries, the sum of the
            `positives`, or None.
        factor: Multiplies the sum.
    """

    momentum: float = 0.0
    ema: str = "debiased"
    normalizer: str = "valid_bins"
    max_weight: float | None = None
    persist: bool = True
    divisor: str | None = None
    factor: float = 1.0


class Kernels(Protocol):
    """An implementation of the losses: a module or an object with these functions.

    `ghm_triton.reference` is the specification, `ghm_triton.cpu` the fast path on CPUs and
    `ghm_triton.ops.backend` the Triton kernels. Every implementation puts an entry into the same
    unit region, and the results agree to rounding. `ghm_triton.reference` documents the arguments.
    """

    def count_bce(self, inputs: ClassificationInputs, bins: int) -> RegionCounts:
        """Count the gradient norms `|sigmoid(x) - p*|` by unit region."""

    def count_asl1(self, inputs: RegressionInputs, bins: int) -> RegionCounts:
        """Count the gradient norms `|d| / sqrt(d^2 + mu^2)` by unit region."""

    def count_softmax(self, inputs: SoftmaxInputs, bins: int) -> RegionCounts:
        """Count the gradient norms `1 - p_y` by unit region."""

    def update_density(
        self, counts: RegionCounts, state: DensityState, options: DensityOptions
    ) -> tuple[Tensor, Tensor]:
        """Compute the weight of each unit region and the scale of the loss."""

    def weighted_bce(
        self,
        inputs: ClassificationInputs,
        table: Tensor,
        scale: Tensor,
        *,
        weighted: bool,
        reduce: bool,
    ) -> Tensor:
        """Binary cross entropy, weighted by unit region."""

    def weighted_asl1(
        self,
        inputs: RegressionInputs,
        table: Tensor,
        scale: Tensor,
        *,
        weighted: bool,
        reduce: bool,
    ) -> Tensor:
        """Authentic smooth L1, weighted by unit region."""

    def weighted_softmax(
        self, inputs: SoftmaxInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
    ) -> Tensor:
        """Softmax cross entropy, weighted by unit region."""

    def weighted_focal(
        self,
        inputs: ClassificationInputs,
        scale: Tensor,
        focus: Focus,
        *,
        weighted: bool,
        reduce: bool,
    ) -> Tensor:
        """Sigmoid focal loss."""
