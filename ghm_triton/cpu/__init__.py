"""The same arithmetic, a block of entries at a time: what trains on CPUs.

Plain tensor operations read and write all of their operands, some thirty of them an element here,
so that a whole batch passes through memory thirty times. These modules run the operations of
`ghm_triton.reference` over blocks that stay in the cache, in scratch memory of their own, and form
the gradient beside the loss. A block with an entry that is not sound (a logit that is not finite, a
target out of range) goes through the specification itself.

Beside the gradient (one logit's bytes an entry) a call holds the scratch memory, which is kept for
the next one: 12 bytes an entry of a block, 16 for boxes; that is 3 or 4 MiB, twice as much where
torch uses several threads.

Tensors that it does not take (see `applies_to`) go to the specification.
"""

from torch import Tensor

from ghm_triton import reference
from ghm_triton.cpu import asl1, bce, density
from ghm_triton.cpu.blocks import applies_to, hold_numbers
from ghm_triton.reference import RegionCounts, count_softmax, weighted_focal, weighted_softmax
from ghm_triton.reference.interface import ClassificationInputs, RegressionInputs

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
    """As `reference.count_bce`, by the faster implementation that applies."""
    count = bce.count_bce if applies_to(inputs) else reference.count_bce
    return count(inputs, bins)


def count_asl1(inputs: RegressionInputs, bins: int, mu: float) -> RegionCounts:
    """As `reference.count_asl1`, by the faster implementation that applies."""
    count = asl1.count_asl1 if applies_to(inputs) else reference.count_asl1
    return count(inputs, bins, mu)


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
    """As `reference.update_density`, by the faster implementation that applies."""
    state = (smoothed, updates, strength)
    quick = hold_numbers(*counts, *state)
    update = density.update_density if quick else reference.update_density
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
    """As `reference.weighted_bce`, by the faster implementation that applies."""
    weigh = bce.weighted_bce if applies_to(inputs) else reference.weighted_bce
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
    """As `reference.weighted_asl1`, by the faster implementation that applies."""
    weigh = asl1.weighted_asl1 if applies_to(inputs) else reference.weighted_asl1
    return weigh(inputs, table, scale, mu=mu, weighted=weighted, reduce=reduce)
