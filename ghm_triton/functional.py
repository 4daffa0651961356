"""The losses as functions: validate, count, weigh, sum."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ghm_triton._inputs import (
    classification_inputs,
    regression_inputs,
    require_bins,
    require_choice,
)
from ghm_triton.backend import select_backend
from ghm_triton.density import DENSITIES, GradientDensity, count_regions
from ghm_triton.reference.binning import compute_dtype, unit_region
from ghm_triton.reference.density import stream_density
from ghm_triton.reference.exact import weigh_asl1, weigh_bce, window_density
from ghm_triton.reference.focal import focal_entries
from ghm_triton.schedule import StrengthSchedule

Reduction = Literal["mean", "sum", "none"]
Average = Literal["valid", "positives"]
Backend = Literal["auto", "triton", "torch"]
Density = Literal["unit_region", "exact", "streaming"]

REDUCTIONS = ("mean", "sum", "none")
AVERAGES = ("valid", "positives")
DEFAULT_STRENGTH = 0.25  # from benchmarks/strength.py; the paper is 1


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
    norms = _density(state, bins, strength, density, normalizer, max_weight, logits)
    with torch.no_grad():
        counts = norms.gather(kernels.count_bce(inputs, norms.regions))
        if norms.method == "exact":
            given = (norms.bins, norms.current_strength(), norms.max_weight)
            inputs = weigh_bce(inputs, *given, weighted=weighted)
            weighted = True
        table, scale = norms.weigh(counts, kernels, *_mean(reduction, average, loss_weight, norms))
    loss: Tensor = kernels.weighted_bce(
        inputs, table, scale, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


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
    norms = _density(state, bins, strength, density, normalizer, max_weight, pred)
    with torch.no_grad():
        counts = norms.gather(kernels.count_asl1(inputs, norms.regions, mu))
        if norms.method == "exact":
            given = (norms.bins, norms.current_strength(), norms.max_weight)
            inputs = weigh_asl1(inputs, *given, mu=mu, weighted=weighted)
            weighted = True
        table, scale = norms.weigh(counts, kernels, *_mean(reduction, "valid", loss_weight, norms))
    loss: Tensor = kernels.weighted_asl1(
        inputs, table, scale, mu=mu, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


def gradient_density(
    gradient_norm: Tensor, bins: int = 30, density: Density = "unit_region"
) -> Tensor:
    """The density of each entry among all: how many share its neighbourhood, by its width.

    Args:
        gradient_norm: `g` in [0, 1], any shape, floating.
        bins: `M`, 1 to 1024; up to 341 for `streaming`.
        density: `unit_region`: `R_ind(g) * M` (equation 8 of arXiv 1811.05181); `exact`: a window
            of width `1 / M` about the entry, as the paper defines it, `O(N log N)`; `streaming`:
            that window from fine regions, within the bound that `stream_density` states.

    Returns:
        float32 of the same shape: entries per unit of gradient norm.

    Raises:
        TypeError: The input is not floating.
        ValueError: A value lies outside [0, 1] or is NaN (looked at on the CPU only); or an option
            does not fit.

    Example:
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


def focal_loss(
    logits: Tensor,
    target: Tensor,
    label_weight: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    average: Average = "positives",
    weighted: bool = False,
    reduction: Reduction = "mean",
    validate: bool | None = None,
) -> Tensor:
    r"""Sigmoid focal loss: `-alpha_t (1 - p_t)^gamma log(p_t)` (arXiv 1708.02002, equation 5).

    In plain torch on every device, for comparison with the harmonized losses and with their
    conventions.

    Args:
        logits: As in `ghm_c_loss`.
        target: As in `ghm_c_loss`; dense targets interpolate between the two sides.
        label_weight: As in `ghm_c_loss`.
        alpha: Weight of the positives, in [0, 1]; negatives have `1 - alpha`.
        gamma: Focusing exponent, at least 0.
        average: As in `ghm_c_loss`.
        weighted: As in `ghm_c_loss`.
        reduction: As in `ghm_c_loss`.
        validate: As in `ghm_c_loss`.

    Returns:
        float32 scalar, or the shape of `logits`.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, option or value does not fit.
    """
    require_reduction(reduction, average)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not gamma >= 0.0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    inputs = classification_inputs(logits, target, label_weight, validate)
    loss, valid, positives = focal_entries(inputs, alpha, gamma, weighted)
    if reduction == "none":
        return loss.view(inputs.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (valid if average == "valid" else positives).clamp(min=1)


def _density(
    state: GradientDensity | None,
    bins: int,
    strength: float | StrengthSchedule,
    density: str,
    normalizer: str,
    max_weight: float | None,
    like: Tensor,
) -> GradientDensity:
    if state is None:
        return GradientDensity(
            bins,
            strength=strength,
            normalizer=normalizer,
            max_weight=max_weight,
            device=like.device,
            density=density,
        )
    if state.smoothed.device != like.device:
        raise ValueError(
            f"the loss keeps its state on {state.smoothed.device}, the predictions are on"
            f" {like.device}: move the loss with .to({str(like.device)!r})"
        )
    return state


def _mean(
    reduction: str, average: str, loss_weight: float, density: GradientDensity
) -> tuple[str | None, float]:
    """What the sum is divided by and what it is multiplied by.

    Ranks average their gradients, so each rank's share of a mean is multiplied by their number.
    """
    if reduction != "mean":
        return None, loss_weight
    return average, loss_weight * density.world_size()


def require_reduction(reduction: str, average: str) -> None:
    """Raise ValueError unless both are known."""
    require_choice("reduction", reduction, REDUCTIONS)
    require_choice("average", average, AVERAGES)
