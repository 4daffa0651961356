"""GHM-C: harmonized binary cross entropy."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghm_triton.losses.backend import BACKENDS, select_backend
from ghm_triton.losses.density import Density, GradientDensity
from ghm_triton.losses.inputs import classification_inputs, require_choice
from ghm_triton.losses.options import (
    DEFAULT_STRENGTH,
    Average,
    Backend,
    Reduction,
    density_for,
    mean_of,
    require_reduction,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.exact import weigh_bce


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

    .. math:: L = \frac{1}{N} \sum_i \beta_i^s \, BCE(x_i, p^*_i), \quad
              \beta_i = \frac{N}{R_{ind(g_i)} \, n}, \quad g_i = |\sigma(x_i) - p^*_i|

    Equations 5 and 9 of arXiv 1811.05181 with unit regions; at `strength` `s = 1` the paper's
    loss. No gradient flows through `beta`.

    Args:
        logits: `[..., C]`, float32, float16 or bfloat16, any strides; arithmetic in float32.
            float64 runs in torch.
        target: Dense, the shape of `logits`, floating in [0, 1] or bool; or class indices, integer
            `logits.shape[:-1]`: `0..C-1` foreground, `C` background, negative ignored.
        label_weight: Broadcasts to `logits`; 0 ignores an entry, any positive value keeps it.
        bins: Unit regions `M`.
        strength: `s` in [0, 1]: 0 is plain binary cross entropy. Not of the paper.
        density: `unit_region`; `exact`: `beta = N / GD(g)` with the paper's sliding window of width
            `1 / M`, by sorting in `O(N log N)`; `streaming`: that window from the counts of fine
            regions. `GradientDensity` tells more.
        normalizer: `n`: `valid_bins` counts the occupied regions (released code), `bins` is `M`
            (the paper). Only `unit_region` has one.
        average: `mean` divides by `valid` entries (the paper), or by `positives`: the sum of the
            targets, at least 1, as focal loss does.
        max_weight: Upper bound of a weight.
        loss_weight: Multiplies the loss.
        weighted: Multiply by `label_weight` as well.
        reduction: `mean`, `sum` (not divided), or `none` (the shape of `logits`).
        state: A `GradientDensity` with its moving average; then `bins`, `strength`, `density`,
            `normalizer` and `max_weight` are the state's, and these arguments are not looked at.
        backend: `auto`, `triton` or `torch`.
        validate: Look at the values of target and weight, which waits for a GPU. None: on the CPU
            only; elsewhere a class index above `C`, or a dense target outside [0, 1], makes the
            loss NaN instead.

    Returns:
        float32 scalar, or the shape of `logits` for `reduction="none"`. A non-finite logit at a
        valid entry makes the loss NaN. Without valid entries the loss is 0.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, device, option or (validating) value does not fit.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0], [-3.0, 0.5]], requires_grad=True)
        >>> labels = torch.tensor([0, 2])  # the second row is background
        >>> loss = ghm_c_loss(logits, labels, average="positives")
        >>> loss.backward()
    """
    require_reduction(reduction, average)
    inputs = classification_inputs(logits, target, label_weight, validate)
    kernels = select_backend(backend, logits)
    norms = density_for(state, bins, strength, density, normalizer, max_weight, logits)
    with torch.no_grad():
        counts = norms.gather(kernels.count_bce(inputs, norms.regions))
        if norms.method == "exact":
            given = (norms.bins, norms.current_strength(), norms.max_weight)
            inputs = weigh_bce(inputs, *given, weighted=weighted)
            weighted = True
        table, scale = norms.weigh(
            counts, kernels, *mean_of(reduction, average, loss_weight, norms)
        )
    loss: Tensor = kernels.weighted_bce(
        inputs, table, scale, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


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
