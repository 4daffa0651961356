"""GHM-R: harmonized authentic smooth L1."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton._inputs import regression_inputs
from ghm_triton.backend import select_backend
from ghm_triton.density import GradientDensity
from ghm_triton.functional.options import (
    DEFAULT_STRENGTH,
    Backend,
    Density,
    Reduction,
    density_for,
    mean_of,
    require_reduction,
)
from ghm_triton.reference.exact import weigh_asl1
from ghm_triton.schedule import StrengthSchedule


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
