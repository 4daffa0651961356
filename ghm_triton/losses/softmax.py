"""Softmax GHM: harmonized cross entropy over exclusive classes, an extension."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ghm_triton.losses.density import DEFAULT_STRENGTH, Density, GradientDensity
from ghm_triton.losses.inputs import require_choice, softmax_inputs
from ghm_triton.losses.options import (
    Backend,
    HarmonizedLoss,
    LossOptions,
    Reduction,
    harmonized_loss,
    select_backend,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.interface import SoftmaxInputs
from ghm_triton.reference.losses import MAX_CLASSES


def ghm_softmax_loss(
    logits: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    bins: int = 30,
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
    r"""Softmax GHM: cross entropy, each sample weighted by the inverse density of its gradient.

    $$ L = -\frac{1}{N} \sum_i \beta_i^s \log p_{y_i}, \quad
       \beta_i = \frac{N}{R_{ind(g_i)} \, n}, \quad g_i = 1 - p_{y_i}, \quad
       p = \mathrm{softmax}(x_i) $$

    An extension: it is neither in arXiv 1811.05181, which weights sigmoids, nor in its released
    code. An entry is a sample, and `g` is the gradient norm of the logit of its class.

    Args:
        logits: `[..., C]`, float32, float16 or bfloat16, any strides; arithmetic in float32.
            float64 runs in torch. Background, if any, is a class like any other.
        target: Class indices, integer `logits.shape[:-1]`: `0..C-1`, negative ignored.
        label_weight: Broadcasts to `target`; 0 ignores a sample, any positive value keeps it.
        bins: Number of unit regions `M`, 1 to 1024.
        strength: `s` in [0, 1], or a schedule; 0 is plain cross entropy.
        density: `unit_region` or `streaming`, as in `ghm_c_loss`; not `exact`.
        normalizer: `valid_bins` (released code) or `bins` (the paper).
        max_weight: Upper bound of a weight.
        loss_weight: Multiplies the loss.
        weighted: Multiply by `label_weight` as well.
        reduction: `mean` divides by the number of valid samples; `sum`; `none` (the shape of
            `target`).
        state: A `GradientDensity` with its moving average, of one of these densities; it then
            replaces `bins`, `strength`, `density`, `normalizer` and `max_weight`.
        backend: `auto`, `triton` or `torch`. The kernels take up to 4096 classes; with more,
            `auto` is torch.
        validate: Check the values of target and weight, which synchronises with a GPU. None: on the
            CPU only; elsewhere a class index of `C` or more makes the loss NaN instead.

    Returns:
        float32 scalar, or the shape of `target`. A non-finite logit in a valid sample makes the
        loss NaN: mask a class by a large negative number, not by -inf. Without valid samples the
        loss is 0.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device, option or (when validating) value is invalid.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.5, 3.0]], requires_grad=True)
        >>> loss = ghm_softmax_loss(logits, torch.tensor([0, 1]))
        >>> loss.backward()
    """
    options = LossOptions(loss_weight, "valid", weighted, reduction, backend, validate)
    inputs = softmax_inputs(logits, target, label_weight, validate)
    if state is None:
        weighing = (bins, 0.0, strength, normalizer, "debiased", max_weight)
        state = GradientDensity(*weighing, device=logits.device, density=density)
    return _ghm_softmax(inputs, state, options)


class GHMSoftmaxLoss(HarmonizedLoss):
    """Softmax GHM with a moving average of its counts; see `ghm_softmax_loss` for the equation.

    For exclusive classes, as in the second stage of Faster R-CNN. An extension of the paper.
    `ghm_softmax_loss` documents the other options.

    Args:
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps no average.
        ema: `debiased` or `mmdet` (the released behaviour); see `GradientDensity`.
        process_group: Ranks that share one density; see `GHMCLoss`.

    The options are attributes, which may be changed. The state (`density.smoothed`,
    `density.updates`) is in the `state_dict`; it changes in training mode only.

    Raises:
        ValueError: An option is invalid.

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
        require_choice("density", density, ("unit_region", "streaming"))
        super().__init__(
            GradientDensity(
                bins, momentum, strength, normalizer, ema, max_weight, process_group, None, density
            ),
            LossOptions(loss_weight, "valid", weighted, reduction, backend, validate),
        )

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Compute the loss; shapes, dtypes and errors are those of `ghm_softmax_loss`."""
        inputs = softmax_inputs(logits, target, label_weight, self.validate)
        return _ghm_softmax(inputs, self.density, self)


def _ghm_softmax(inputs: SoftmaxInputs, density: GradientDensity, options: LossOptions) -> Tensor:
    if density.method == "exact":
        raise ValueError("softmax GHM has density='unit_region' or 'streaming', not 'exact'")
    too_wide = options.backend == "auto" and inputs.logits.shape[1] > MAX_CLASSES
    kernels = select_backend("torch" if too_wide else options.backend, inputs.logits)
    return harmonized_loss(
        *(inputs, inputs.logits, density, options, kernels),
        count=kernels.count_softmax,
        loss=kernels.weighted_softmax,
    )
