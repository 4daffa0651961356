"""GHM-C: harmonized binary cross entropy."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ghm_triton.losses.density import DEFAULT_STRENGTH, Density, GradientDensity
from ghm_triton.losses.inputs import classification_inputs
from ghm_triton.losses.options import (
    Average,
    Backend,
    HarmonizedLoss,
    LossOptions,
    Reduction,
    harmonized_loss,
    select_backend,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.interface import ClassificationInputs


def ghm_c_loss(
    logits: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    bins: int = 30,
    strength: float | StrengthSchedule = DEFAULT_STRENGTH,
    density: Density = "unit_region",
    normalizer: str = "valid_bins",
    average: Average = "valid",
    max_weight: float | None = None,
    loss_weight: float = 1.0,
    weighted: bool = False,
    reduction: Reduction = "mean",
    state: GradientDensity | None = None,
    backend: Backend = "auto",
    validate: bool | None = None,
) -> Tensor:
    r"""GHM-C: binary cross entropy, each entry weighted by the inverse density of its gradient.

    $$ L = \frac{1}{N} \sum_i \beta_i^s \, BCE(x_i, p^*_i), \quad
       \beta_i = \frac{N}{R_{ind(g_i)} \, n}, \quad g_i = |\sigma(x_i) - p^*_i| $$

    Equations 5 and 9 of arXiv 1811.05181 with unit regions; with `strength` `s = 1` it is the
    paper's loss. No gradient flows through `beta`.

    Args:
        logits: `[..., C]`, float32, float16 or bfloat16, any strides; arithmetic in float32.
            float64 runs in torch.
        target: Dense, the shape of `logits`, floating in [0, 1] or bool; or class indices, integer
            `logits.shape[:-1]`: `0..C-1` foreground, `C` background, negative ignored.
        label_weight: Broadcasts to `logits`; 0 ignores an entry, any positive value keeps it.
        bins: Number of unit regions `M`, 1 to 1024.
        strength: `s` in [0, 1], or a schedule; 0 is plain binary cross entropy. Not in the paper.
        density: `unit_region`; `exact`: `beta = N / GD(g)` with the paper's sliding window of width
            `1 / M`, by sorting in `O(N log N)`; `streaming`: that window from the counts of fine
            regions. See `GradientDensity`.
        normalizer: `n`: `valid_bins` is the number of occupied regions (released code), `bins` is
            `M` (the paper). For `unit_region` only.
        average: `mean` divides by the number of `valid` entries (the paper), or by `positives`: the
            sum of the targets, at least 1, as focal loss does.
        max_weight: Upper bound of a weight.
        loss_weight: Multiplies the loss.
        weighted: Multiply by `label_weight` as well.
        reduction: `mean`, `sum` (not divided), or `none` (the shape of `logits`).
        state: A `GradientDensity` with its moving average; it then replaces `bins`, `strength`,
            `density`, `normalizer` and `max_weight`.
        backend: `auto`, `triton` or `torch`.
        validate: Check the values of target and weight, which synchronises with a GPU. None: on the
            CPU only; elsewhere a class index above `C`, or a dense target outside [0, 1], makes the
            loss NaN instead.

    Returns:
        float32 scalar, or the shape of `logits` for `reduction="none"`. A non-finite logit at a
        valid entry makes the loss NaN. Without valid entries the loss is 0.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: A shape, device, option or (when validating) value is invalid.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, -1.0], [-3.0, 0.5]], requires_grad=True)
        >>> labels = torch.tensor([0, 2])  # the second row is background
        >>> loss = ghm_c_loss(logits, labels, average="positives")
        >>> loss.backward()
    """
    options = LossOptions(loss_weight, average, weighted, reduction, backend, validate)
    inputs = classification_inputs(logits, target, label_weight, validate)
    if state is None:
        weighing = (bins, 0.0, strength, normalizer, "debiased", max_weight)
        state = GradientDensity(*weighing, device=logits.device, density=density)
    return _ghm_c(inputs, state, options)


class GHMCLoss(HarmonizedLoss):
    """GHM-C with a moving average of its counts; see `ghm_c_loss` for the equation.

    `ghm_c_loss` documents the other options.

    Args:
        momentum: Of the moving average of the counts, in [0, 1); 0 keeps no average.
        ema: `debiased` or `mmdet` (the released behaviour); see `GradientDensity`.
        process_group: Ranks that share one density. The average of the losses of `N` ranks (DDP
            averages gradients) then equals the loss of one rank with the whole batch. Not for
            `exact`. `GradientDensity` documents the use with DDP and FSDP2.

    The options are attributes, which may be changed. The state (`density.smoothed`,
    `density.updates`) is in the `state_dict`; it changes in training mode only.

    Raises:
        ValueError: An option is invalid.

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
        super().__init__(
            GradientDensity(
                bins, momentum, strength, normalizer, ema, max_weight, process_group, None, density
            ),
            LossOptions(loss_weight, average, weighted, reduction, backend, validate),
        )

    def forward(self, logits: Tensor, target: Tensor, label_weight: Tensor | None = None) -> Tensor:
        """Compute the loss; shapes, dtypes and errors are those of `ghm_c_loss`."""
        inputs = classification_inputs(logits, target, label_weight, self.validate)
        return _ghm_c(inputs, self.density, self)


def _ghm_c(inputs: ClassificationInputs, density: GradientDensity, options: LossOptions) -> Tensor:
    kernels = select_backend(options.backend, inputs.logits)
    return harmonized_loss(
        *(inputs, inputs.logits, density, options, kernels),
        count=kernels.count_bce,
        loss=kernels.weighted_bce,
    )
