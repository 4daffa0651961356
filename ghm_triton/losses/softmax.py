"""Softmax GHM: harmonized cross entropy over exclusive classes, an extension."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ghm_triton import cpu
from ghm_triton.losses.backend import BACKENDS, select_backend
from ghm_triton.losses.density import Density, GradientDensity
from ghm_triton.losses.inputs import require_choice, softmax_inputs
from ghm_triton.losses.options import (
    DEFAULT_STRENGTH,
    Backend,
    Reduction,
    density_for,
    mean_of,
    require_reduction,
)
from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.interface import Kernels
from ghm_triton.reference.softmax import MAX_CLASSES


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

    .. math:: L = -\frac{1}{N} \sum_i \beta_i^s \log p_{y_i}, \quad
              \beta_i = \frac{N}{R_{ind(g_i)} \, n}, \quad g_i = 1 - p_{y_i}, \quad
              p = \mathrm{softmax}(x_i)

    An extension: neither arXiv 1811.05181, which weighs sigmoids, nor its released code has it. The
    entry is the sample, and `g` the gradient norm of its own class's logit.

    Args:
        logits: `[..., C]`, float32, float16 or bfloat16, any strides; arithmetic in float32.
            float64 runs in torch. Background, where there is one, is a class like any other.
        target: Class indices, integer `logits.shape[:-1]`: `0..C-1`, negative ignored.
        label_weight: Broadcasts to `target`; 0 ignores a sample, any positive value keeps it.
        bins: Unit regions `M`.
        strength: `s` in [0, 1]: 0 is plain cross entropy.
        density: `unit_region` or `streaming`, as in `ghm_c_loss`; not `exact`.
        normalizer: As in `ghm_c_loss`.
        max_weight: As in `ghm_c_loss`.
        loss_weight: As in `ghm_c_loss`.
        weighted: As in `ghm_c_loss`.
        reduction: `mean` divides by the valid samples; `sum`; `none` (the shape of `target`).
        state: As in `ghm_c_loss`; of the same densities.
        backend: As in `ghm_c_loss`. The kernels take up to 4096 classes; with more, `auto` is
            torch.
        validate: As in `ghm_c_loss`.

    Returns:
        float32 scalar, or the shape of `target`. A non-finite logit in a valid sample makes the
        loss NaN: a class is masked by a large negative number, not by -inf. Without valid samples
        the loss is 0.

    Raises:
        TypeError: A dtype does not fit.
        ValueError: A shape, device, option or (validating) value does not fit.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0, 0.0], [0.5, 0.5, 3.0]], requires_grad=True)
        >>> loss = ghm_softmax_loss(logits, torch.tensor([0, 1]))
        >>> loss.backward()
    """
    require_reduction(reduction, "valid")
    inputs = softmax_inputs(logits, target, label_weight, validate)
    kernels = _kernels(backend, logits)
    norms = density_for(state, bins, strength, density, normalizer, max_weight, logits)
    if norms.method == "exact":
        raise ValueError("softmax GHM has density='unit_region' or 'streaming', not 'exact'")
    with torch.no_grad():
        counts = norms.gather(kernels.count_softmax(inputs, norms.regions))
        table, scale = norms.weigh(
            counts, kernels, *mean_of(reduction, "valid", loss_weight, norms)
        )
    loss: Tensor = kernels.weighted_softmax(
        inputs, table, scale, weighted=weighted, reduce=reduction != "none"
    )
    return loss.view(inputs.shape) if reduction == "none" else loss


def _kernels(backend: str, logits: Tensor) -> Kernels:
    """As `select_backend`; `auto` leaves rows that are too long for the kernels to torch."""
    if backend == "auto" and logits.shape[-1] > MAX_CLASSES:
        return cpu
    return select_backend(backend, logits)


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
