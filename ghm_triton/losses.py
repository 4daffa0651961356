"""The losses as modules: what a training loop holds."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from ghm_triton._inputs import require_choice
from ghm_triton.backend import BACKENDS
from ghm_triton.density import GradientDensity
from ghm_triton.functional import focal_loss, ghm_c_loss, ghm_r_loss, ghm_softmax_loss
from ghm_triton.functional.options import (
    DEFAULT_STRENGTH,
    Average,
    Backend,
    Density,
    Reduction,
    require_reduction,
)
from ghm_triton.schedule import StrengthSchedule


class GHMCLoss(nn.Module):
    """GHM-C with its moving average: harmonized binary cross entropy (arXiv 1811.05181).

    Args:
        bins: Unit regions `M`.
        momentum: Of the moving average of the counts, in [0, 1).
        strength: The weight is `beta ** strength`, in [0, 1], or a `StrengthSchedule`. 1 is the
            paper, 0 plain cross entropy. Ours, not the paper's.
        loss_weight: Multiplies the loss.
        density: `unit_region`; `exact`, the paper's sliding window, which sorts the entries; or
            `streaming`, that window from a fine histogram. See `GradientDensity`.
        normalizer: `valid_bins` (released code) or `bins` (the paper).
        average: `valid` (the paper) or `positives` (as focal loss).
        ema: `debiased` or `mmdet` (the released behaviour).
        max_weight: Upper bound of a weight, or None.
        weighted: Multiply by `label_weight` as well as select by it.
        reduction: `mean`, `sum` or `none`.
        process_group: Ranks that share one density. A loss of `N` ranks, averaged (as DDP does
            with gradients), then equals that of one rank with the whole batch. Not with `exact`.
            `GradientDensity` tells how to use it with DDP and FSDP2.
        backend: `auto`, `triton` or `torch`.
        validate: As in `ghm_c_loss`.

    The state (`density.smoothed`, `density.updates`) is in the `state_dict`; it moves in training
    mode only.

    Example:
        >>> import torch
        >>> criterion = GHMCLoss()
        >>> loss = criterion(torch.randn(8, 100, 80), torch.randint(0, 81, (8, 100)))
    """

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        strength: float | StrengthSchedule = DEFAULT_STRENGTH,
        loss_weight: float = 1.0,
        density: Density = "unit_region",
        normalizer: str = "valid_bins",
        average: Average = "valid",
        ema: str = "debiased",
        max_weight: float | None = None,
        weighted: bool = False,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        self.density = GradientDensity(
            bins, momentum, strength, normalizer, ema, max_weight, process_group, density=density
        )
        require_reduction(reduction, average)
        require_choice("backend", backend, BACKENDS)
        self.loss_weight = loss_weight
        self.average: Average = average
        self.weighted = weighted
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.validate = validate

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes, dtypes and errors as in `ghm_c_loss`."""
        return ghm_c_loss(
            logits,
            target,
            label_weight,
            average=self.average,
            loss_weight=self.loss_weight,
            weighted=self.weighted,
            reduction=self.reduction,
            state=self.density,
            backend=self.backend,
            validate=self.validate,
        )


class GHMRLoss(nn.Module):
    """GHM-R with its moving average: harmonized authentic smooth L1 (arXiv 1811.05181).

    Args:
        mu: Width of the quadratic part of ASL1.
        bins: Unit regions `M`.
        momentum: Of the moving average of the counts, in [0, 1).
        strength: As in `GHMCLoss`.
        loss_weight: Multiplies the loss; the released configuration uses 10.
        density: As in `GHMCLoss`.
        normalizer: As in `GHMCLoss`.
        ema: As in `GHMCLoss`.
        max_weight: As in `GHMCLoss`.
        weighted: As in `GHMCLoss`.
        reduction: As in `GHMCLoss`.
        process_group: As in `GHMCLoss`.
        backend: As in `GHMCLoss`.
        validate: As in `ghm_r_loss`.
    """

    def __init__(
        self,
        mu: float = 0.02,
        bins: int = 10,
        momentum: float = 0.7,
        strength: float | StrengthSchedule = DEFAULT_STRENGTH,
        loss_weight: float = 1.0,
        density: Density = "unit_region",
        normalizer: str = "valid_bins",
        ema: str = "debiased",
        max_weight: float | None = None,
        weighted: bool = False,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        self.density = GradientDensity(
            bins, momentum, strength, normalizer, ema, max_weight, process_group, density=density
        )
        if not mu > 0:
            raise ValueError(f"mu must be positive, got {mu}")
        require_reduction(reduction, "valid")
        require_choice("backend", backend, BACKENDS)
        self.mu = mu
        self.loss_weight = loss_weight
        self.weighted = weighted
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.validate = validate

    def forward(self, pred: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes, dtypes and errors as in `ghm_r_loss`."""
        return ghm_r_loss(
            pred,
            target,
            label_weight,
            mu=self.mu,
            loss_weight=self.loss_weight,
            weighted=self.weighted,
            reduction=self.reduction,
            state=self.density,
            backend=self.backend,
            validate=self.validate,
        )


class GHMSoftmaxLoss(nn.Module):
    """Softmax GHM with its moving average: harmonized cross entropy; an extension.

    For classes that exclude each other, as in the second stage of Faster R-CNN. Neither the paper
    nor its released code has it.

    Args:
        bins: Unit regions `M`.
        momentum: Of the moving average of the counts, in [0, 1).
        strength: As in `GHMCLoss`.
        loss_weight: Multiplies the loss.
        density: `unit_region` or `streaming`.
        normalizer: As in `GHMCLoss`.
        ema: As in `GHMCLoss`.
        max_weight: As in `GHMCLoss`.
        weighted: As in `GHMCLoss`.
        reduction: `mean`, `sum` or `none`.
        process_group: As in `GHMCLoss`.
        backend: `auto`, `triton` or `torch`.
        validate: As in `ghm_c_loss`.

    Example:
        >>> import torch
        >>> criterion = GHMSoftmaxLoss()
        >>> loss = criterion(torch.randn(8, 100, 81), torch.randint(0, 81, (8, 100)))
    """

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        strength: float | StrengthSchedule = DEFAULT_STRENGTH,
        loss_weight: float = 1.0,
        density: Density = "unit_region",
        normalizer: str = "valid_bins",
        ema: str = "debiased",
        max_weight: float | None = None,
        weighted: bool = False,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        require_choice("density", density, ("unit_region", "streaming"))
        self.density = GradientDensity(
            bins, momentum, strength, normalizer, ema, max_weight, process_group, density=density
        )
        require_reduction(reduction, "valid")
        require_choice("backend", backend, BACKENDS)
        self.loss_weight = loss_weight
        self.weighted = weighted
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.validate = validate

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes, dtypes and errors as in `ghm_softmax_loss`."""
        return ghm_softmax_loss(
            logits,
            target,
            label_weight,
            loss_weight=self.loss_weight,
            weighted=self.weighted,
            reduction=self.reduction,
            state=self.density,
            backend=self.backend,
            validate=self.validate,
        )


class FocalLoss(nn.Module):
    """Sigmoid focal loss with the target conventions of `GHMCLoss` (arXiv 1708.02002).

    Args:
        alpha: Weight of the positives, in [0, 1].
        gamma: Focusing exponent, at least 0.
        loss_weight: Multiplies the loss.
        average: `positives` (the paper) or `valid`.
        weighted: Multiply by `label_weight` as well as select by it.
        reduction: `mean`, `sum` or `none`.
        backend: `auto`, `triton` or `torch`.
        validate: As in `ghm_c_loss`.
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        loss_weight: float = 1.0,
        average: Average = "positives",
        weighted: bool = False,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        require_reduction(reduction, average)
        require_choice("backend", backend, BACKENDS)
        self.alpha = alpha
        self.gamma = gamma
        self.loss_weight = loss_weight
        self.average: Average = average
        self.weighted = weighted
        self.reduction: Reduction = reduction
        self.backend: Backend = backend
        self.validate = validate

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """The loss; shapes, dtypes and errors as in `focal_loss`."""
        return focal_loss(
            logits,
            target,
            label_weight,
            alpha=self.alpha,
            gamma=self.gamma,
            average=self.average,
            loss_weight=self.loss_weight,
            weighted=self.weighted,
            reduction=self.reduction,
            backend=self.backend,
            validate=self.validate,
        )
