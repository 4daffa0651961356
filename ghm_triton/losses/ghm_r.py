"""GHM-R: harmonized authentic smooth L1."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ghm_triton.losses.density import DEFAULT_STRENGTH, Density, GradientDensity
from ghm_triton.losses.inputs import regression_inputs
from ghm_triton.losses.options import (
    Backend,
    HarmonizedLoss,
    LossOptions,
    Reduction,
    harmonized_loss,
    select_backend,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.interface import RegressionInputs


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

    $$ L = \frac{1}{N} \sum_i \beta_i^s \, ASL_1(d_i), \quad
       ASL_1(d) = \sqrt{d^2 + \mu^2} - \mu, \quad g = \frac{|d|}{\sqrt{d^2 + \mu^2}} $$

    Equations 11 to 14 of arXiv 1811.05181; `d = pred - target`, `beta` as in `ghm_c_loss`.

    Args:
        pred: Box deltas of the positive samples, any shape and strides, float32, float16 or
            bfloat16; arithmetic in float32. float64 runs in torch.
        target: The same shape, floating. No gradient reaches it.
        label_weight: Broadcasts to `pred`; 0 ignores an entry, any positive value keeps it.
        mu: Width of the quadratic part, positive.
        bins: Number of unit regions `M`, 1 to 1024.
        strength: `s` in [0, 1], or a schedule; 0 is plain authentic smooth L1.
        density: `unit_region`, `exact` or `streaming`; see `ghm_c_loss`.
        normalizer: `valid_bins` (released code) or `bins` (the paper).
        max_weight: Upper bound of a weight.
        loss_weight: Multiplies the loss.
        weighted: Multiply by `label_weight` as well.
        reduction: `mean` divides by the number of valid entries; `sum`; `none` (the shape of
            `pred`).
        state: A `GradientDensity` with its moving average; it then replaces `bins`, `strength`,
            `density`, `normalizer` and `max_weight`.
        backend: `auto`, `triton` or `torch`.
        validate: Check the values of the weight, which synchronises with a GPU. None: on the CPU
            only.

    Returns:
        float32 scalar, or the shape of `pred`. NaN when a valid difference is not finite. Without
        valid entries the loss is 0.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device, option or (when validating) value is invalid.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[0.1, -0.2, 0.0, 0.05]], requires_grad=True)
        >>> loss = ghm_r_loss(pred, torch.zeros(1, 4))
        >>> loss.backward()
    """
    options = LossOptions(loss_weight, "valid", weighted, reduction, backend, validate)
    mu = require_mu(mu)
    inputs = regression_inputs(pred, target, label_weight, validate, mu)
    if state is None:
        weighing = (bins, 0.0, strength, normalizer, "debiased", max_weight)
        state = GradientDensity(*weighing, device=pred.device, density=density)
    return _ghm_r(inputs, state, options)


class GHMRLoss(HarmonizedLoss):
    """GHM-R with a moving average of its counts; see `ghm_r_loss` for the equation.

    `ghm_r_loss` documents the other options.

    Args:
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps no average.
        loss_weight: Multiplies the loss; the released configuration uses 10.
        ema: `debiased` or `mmdet` (the released behaviour); see `GradientDensity`.
        process_group: Ranks that share one density; see `GHMCLoss`. Not for `exact`.

    The options are attributes, which may be changed. The state (`density.smoothed`,
    `density.updates`) is in the `state_dict`; it changes in training mode only.

    Raises:
        ValueError: An option is invalid.

    Example:
        >>> import torch
        >>> criterion = GHMRLoss(loss_weight=10.0)
        >>> loss = criterion(torch.randn(32, 4), torch.randn(32, 4))
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
        super().__init__(
            GradientDensity(
                bins, momentum, strength, normalizer, ema, max_weight, process_group, None, density
            ),
            LossOptions(loss_weight, "valid", weighted, reduction, backend, validate),
        )
        self.mu = require_mu(mu)

    def forward(self, pred: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Compute the loss; shapes, dtypes and errors are those of `ghm_r_loss`."""
        inputs = regression_inputs(pred, target, label_weight, self.validate, self.mu)
        return _ghm_r(inputs, self.density, self)


def require_mu(mu: float) -> float:
    """Return `mu` if it is positive, or raise ValueError."""
    if not mu > 0:
        raise ValueError(f"mu must be positive, got {mu}")
    return mu


def _ghm_r(inputs: RegressionInputs, density: GradientDensity, options: LossOptions) -> Tensor:
    kernels = select_backend(options.backend, inputs.pred)
    return harmonized_loss(
        *(inputs, inputs.pred, density, options, kernels),
        count=kernels.count_asl1,
        loss=kernels.weighted_asl1,
    )
