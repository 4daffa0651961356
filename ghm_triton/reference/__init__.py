"""The kernels' arithmetic in plain torch: the executable specification, and the CPU path.

Every name here has its twin in `ghm_triton.ops` with the same signature. Two implementations stand
behind these names:

- the specification (`binning`, `bce`, `asl1`): one tensor operation after another over the whole
  batch, without a look at a value, so that it can be traced. It runs in float64, on other devices,
  and under `torch.compile`, `torch.export`, `torch.func` and forward-mode differentiation;
- `blockwise`: the same arithmetic on blocks that stay in the cache, with the gradient formed beside
  the loss. It runs on tensors of the CPU in float32, float16 and bfloat16, that is, in training.

Both put every entry into the same unit region and agree to rounding. The specification is
differentiable any number of times; `blockwise` once, and says so to whom asks for more.
"""

from torch import Tensor

from ghm_triton._inputs import ClassificationInputs, RegressionInputs
from ghm_triton.reference import asl1, bce, binning, blockwise, density
from ghm_triton.reference.binning import RegionCounts
from ghm_triton.reference.focal import weighted_focal
from ghm_triton.reference.softmax import count_softmax, weighted_softmax

__all__ = [
    "RegionCounts",
    "count_asl1",
    "count_bce",
    "count_softmax",
    "update_density",
    "weighted_asl1",
    "weighted_bce",
    "weighted_focal",
    "weighted_softmax",
]


def count_bce(inputs: ClassificationInputs, bins: int) -> RegionCounts:
    """As `binning.count_bce`, by the faster implementation that applies."""
    if blockwise.applies_to(inputs):
        return blockwise.count_bce(inputs, bins)
    return binning.count_bce(inputs, bins)


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """As `binning.count_asl1`, by the faster implementation that applies."""
    if blockwise.applies_to(inputs):
        return blockwise.count_asl1(inputs, bins, mu)
    return binning.count_asl1(inputs, bins, mu)


def update_density(
    counts: RegionCounts,
    smoothed: Tensor,
    updates: Tensor,
    strength: Tensor,
    *,
    momentum: float,
    ema: str,
    normalizer: str,
    max_weight: float | None,
    persist: bool,
    divisor: str | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """As `density.update_density`, by the faster implementation that applies."""
    state = (smoothed, updates, strength)
    quick = blockwise.hold_numbers(*counts, *state)
    update = blockwise.update_density if quick else density.update_density
    return update(
        counts,
        *state,
        momentum=momentum,
        ema=ema,
        normalizer=normalizer,
        max_weight=max_weight,
        persist=persist,
        divisor=divisor,
        factor=factor,
    )


def weighted_bce(
    inputs: ClassificationInputs, table: Tensor, scale: Tensor, *, weighted: bool, reduce: bool
) -> Tensor:
    """As `bce.weighted_bce`, by the faster implementation that applies."""
    weigh = blockwise.weighted_bce if blockwise.applies_to(inputs) else bce.weighted_bce
    return weigh(inputs, table, scale, weighted=weighted, reduce=reduce)


def weighted_asl1(
    inputs: RegressionInputs,
    table: Tensor,
    scale: Tensor,
    *,
    mu: float,
    weighted: bool,
    reduce: bool,
) -> Tensor:
    """As `asl1.weighted_asl1`, by the faster implementation that applies."""
    weigh = blockwise.weighted_asl1 if blockwise.applies_to(inputs) else asl1.weighted_asl1
    return weigh(inputs, table, scale, mu=mu, weighted=weighted, reduce=reduce)
