"""GHM-C: harmonized binary cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from ghm_triton._inputs import classification_inputs
from ghm_triton.backend import select_backend
from ghm_triton.density import GradientDensity
from ghm_triton.functional.options import (
    DEFAULT_STRENGTH,
    Average,
    Backend,
    Density,
    Reduction,
    density_for,
    mean_of,
    require_reduction,
)
from ghm_triton.reference.exact import weigh_bce
from ghm_triton.schedule import StrengthSchedule


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
