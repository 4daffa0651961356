"""GHM-R: harmonized authentic smooth L1."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghm_triton.losses.backend import BACKENDS, select_backend
from ghm_triton.losses.density import Density, GradientDensity
from ghm_triton.losses.inputs import regression_inputs, require_choice
from ghm_triton.losses.options import (
    DEFAULT_STRENGTH,
    Backend,
    Reduction,
    density_for,
    mean_of,
    require_reduction,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.exact import weigh_asl1


def ghm_r_loss(
    pred: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    mu: float = 0.02,
    bins: int = 10,
    strength: float | StrengthSchedule = DEFAULT_STRENGTH,
    density: Density = "unit_region",
    normalizer: str = "valid_bins",
    max_weight: float | None = None,
    loss_weight: float = 1.0,
    weighted: bool = False,
    reduction: Reduction = "mean",
    state: GradientDensity | None = None,
    backend: Backend = "auto",
    validate: bool | None = None,
) -> Tensor:
    r"""GHM-R: authentic smooth L1, each entry weighted by the inverse density of its gradient.

    .. math:: L = \frac{1}{N} \sum_i \beta_i^s \, ASL_1(d_i), \quad
              ASL_1(d) = \sqrt{d^2 + \mu^2} - \mu, \quad g = \frac{|d|}{\sqrt{d^2 + \mu^2}}

    Equations 11 to 14 of arXiv 1811.05181.

    Args:
        pred: Box deltas of the positive samples, any shape, floating.
        target: The same shape. No gradient reaches it.
        label_weight: Broadcasts to `pred`; 0 ignores an entry.
        mu: Width of the quadratic part, positive.
        bins: Unit regions `M`.
        strength: As in `ghm_c_loss`.
        density: As in `ghm_c_loss`.
        normalizer: As in `ghm_c_loss`.
        max_weight: As in `ghm_c_loss`.
        loss_weight: As in `ghm_c_loss`.
        weighted: As in `ghm_c_loss`.
        reduction: `mean` divides by the valid entries; `sum`; `none`.
        state: As in `ghm_c_loss`.
        backend: As in `ghm_c_loss`.
        validate: As in `ghm_c_loss`.

    Returns:
        float32 scalar, or the shape of `pred`. 0 for empty input.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, device, option or (validating) value does not fit.
    """
    require_reduction(reduction, "valid")
    if not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}")
    inputs = regression_inputs(pred, target, label_weight, validate)
    kernels = select_backend(backend, pred)
    norms = density_for(state, bins, strength, density, normalizer, max_weight, pred)
    with torch.no_grad():
        counts = norms.gather(kernels.count_asl1(inputs, norms.regions, mu))
        if norms.method == "exact":
            given = (norms.bins, norms.current_strength(), norms.max_weight)
            inputs = weigh_asl1(inputs, *given, mu=mu, weighted=weighted)
            weighted = True
        table, scale = norms.weigh(
            counts, kernels, *mean_of(reduction, "valid", loss_weight, norms)
        )
    loss: Tensor = kernels.weighted_asl1(
        inputs, table, scale, mu=mu, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


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
