"""Training without sampling: optimal prior and guided loss (arXiv 1909.04868)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from ghm_triton.evidence import ClassStatistics
from ghm_triton.state import SharedState

Target = dict[str, Tensor]
MEMORY = 0.9  # momentum of the ratio that is used for a batch without positives


@runtime_checkable
class Assigner(Protocol):
    """A detector that assigns labels to its anchors, as dense detectors do."""

    def labels(self, targets: list[Target]) -> Tensor:
        """int64 `[B, A]`: `C` is background, negative is ignored."""
        ...


def count_priors(
    detector: Assigner, targets: Iterable[list[Target]], class_names: Sequence[str]
) -> ClassStatistics:
    """Count the labels that a detector assigns to images, without running its network.

    Args:
        detector: Assigns labels to targets.
        targets: Batches of targets: `boxes` `[N, 4]` in input pixels, `labels` int64 `[N]`, and
            optionally `ignore` bool `[N]`.
        class_names: The classes in label order.

    Returns:
        Statistics with `anchors` (`N`: positive and negative ones) and `positives` per class (with
        sum `N_f`).
    """
    statistics = ClassStatistics(tuple(class_names))
    with torch.no_grad():
        for batch in targets:
            labels = detector.labels(batch)
            slots = labels[labels >= 0].flatten()
            statistics.add_labels(torch.bincount(slots, minlength=len(class_names) + 1))
    return statistics


def optimal_prior(positives: int, counted: int, classes: int) -> float:
    r"""Compute the foreground probability to initialise with: `pi* = N_f / (N C)`.

    It minimises the initial loss per positive,
    $$ -\log \pi - \left( \frac{N C}{N_f} - 1 \right) \log(1 - \pi) $$

    Args:
        positives: `N_f`, the number of anchors assigned to a class.
        counted: `N`, the number of anchors that are positive or negative, not ignored.
        classes: `C`, the number of classes.

    Returns:
        In (0, 1).

    Raises:
        ValueError: There is no positive, or the counts contradict each other.

    Example:
        >>> optimal_prior(positives=1, counted=1123, classes=80)  # RetinaNet on COCO
        1.1130899376669635e-05
    """
    if classes < 1 or counted < positives or positives < 0:
        raise ValueError(f"no such counts: {positives=}, {counted=}, {classes=}")
    if positives == 0:
        raise ValueError(f"there is no positive among {counted} anchors, so no prior is optimal")
    if positives == counted * classes:
        raise ValueError("there is no negative, so no prior is optimal")
    return positives / (counted * classes)


def prior_bias(prior: float) -> float:
    """Compute the bias for which a sigmoid is `prior`: `-log(1 / pi - 1)`.

    Raises:
        ValueError: The prior does not lie in (0, 1).
    """
    return -math.log((1 - _require_prior(prior)) / prior)


class InitialLoss(NamedTuple):
    """Initial cross entropy per positive: its own and that of its share of the negatives."""

    foreground: float
    background: float


def initial_loss(prior: float, *, positives: int, counted: int, classes: int) -> InitialLoss:
    """Compute the loss per positive of a detector that predicts `prior` everywhere.

    Args:
        prior: In (0, 1).
        positives: `N_f`, the number of anchors assigned to a class.
        counted: `N`, the number of anchors that are positive or negative, not ignored.
        classes: `C`, the number of classes.

    Returns:
        `-log(pi)` and `-(N C / N_f - 1) log(1 - pi)`.

    Raises:
        ValueError: The prior or a count is out of range.

    Example:
        >>> initial_loss(0.01, positives=1, counted=1000, classes=80).foreground
        4.605170185988091
    """
    negatives = 1 / optimal_prior(positives, counted, classes) - 1
    return InitialLoss(-math.log(_require_prior(prior)), -negatives * math.log1p(-prior))


def _require_prior(prior: float) -> float:
    if not 0.0 < prior < 1.0:
        raise ValueError(f"prior must lie in (0, 1), got {prior}")
    return prior


class GuidedTerms(NamedTuple):
    """The terms `w_cls r L_cls` and `w_reg L_reg`, scalars; their sum is the guided loss."""

    classification: Tensor
    regression: Tensor


def guided(
    classification: Tensor,
    regression: Tensor,
    *,
    cls_weight: float = 1.0,
    reg_weight: float = 1.0,
    process_group: dist.ProcessGroup | None = None,
) -> GuidedTerms:
    r"""Scale the classification loss to the regression loss.

    $$ L = w_{reg} L_{reg} + w_{cls} \, r \, L_{cls}, \quad r = \frac{w_{reg} L_{reg}}{L_{cls}} $$

    No gradient flows through `r`. It is 1 where it is undefined or degenerate: for `L_cls = 0`,
    where the released code divides by 0, and for `L_reg = 0`, as in a batch without positives,
    where it would remove the gradient of every negative. Such a batch then weighs more than the
    others; `GuidedLoss` uses the ratio of previous batches instead.

    Args:
        classification: `L_cls`, scalar, at least 0.
        regression: `L_reg`, scalar, at least 0.
        cls_weight: `w_cls`.
        reg_weight: `w_reg`.
        process_group: Ranks whose losses are averaged to form one `r`, as gradients are averaged;
            every rank must make the call.

    Returns:
        Both terms. NaN and infinity propagate.

    Raises:
        ValueError: A loss is not a scalar, or a weight is not positive.
    """
    _require_terms(classification, regression)
    _require_weights(cls_weight, reg_weight)
    regression = reg_weight * regression
    both = _sum_over_ranks(classification, regression, process_group)
    return _scaled(classification, regression, _ratio(both, torch.ones_like(both)), cls_weight)


class GuidedLoss(SharedState):
    """Guided loss as a module; see `guided` for the equation.

    A batch without positives has no `L_reg` to scale to. It is scaled by the ratio of the moving
    averages (momentum 0.9) of `w_reg L_reg` and `L_cls` over previous batches in training mode, or
    by 1 before the first.

    Args:
        cls_weight: `w_cls`, positive.
        reg_weight: `w_reg`, positive.
        process_group: Ranks that share one ratio.

    Raises:
        ValueError: A weight is not positive.

    Attributes:
        usual: float32 `[2]`, the averages of `L_cls` and `w_reg L_reg`; zeros before the first.

    Example:
        >>> import torch
        >>> criterion = GuidedLoss()
        >>> float(criterion(torch.tensor(2.0), torch.tensor(0.5)))
        1.0
    """

    FLOAT32 = ("usual",)
    usual: Tensor

    def __init__(
        self,
        cls_weight: float = 1.0,
        reg_weight: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group)
        _require_weights(cls_weight, reg_weight)
        self.cls_weight, self.reg_weight = cls_weight, reg_weight
        self.register_buffer("usual", torch.zeros(2, dtype=torch.float32))

    def terms(self, classification: Tensor, regression: Tensor) -> GuidedTerms:
        """Compute both terms of the loss."""
        _require_terms(classification, regression)
        regression = self.reg_weight * regression
        both = _sum_over_ranks(classification, regression, self.process_group)
        self.usual = self.usual.to(both.device)  # once, for a guide that was left on the CPU
        ratio = _ratio(both, self.usual.double())
        if self.training:
            self._remember(both)
        return _scaled(classification, regression, ratio, self.cls_weight)

    @torch.no_grad()
    def _remember(self, both: Tensor) -> None:
        # Sums over ranks, not divided by their number: only the ratio is used.
        after = MEMORY * self.usual + (1 - MEMORY) * both.float()
        sound = torch.isfinite(after).all() & (both > 0).all()
        self.usual.copy_(torch.where(sound, after, self.usual))

    def reset_parameters(self) -> None:
        """Reset the averages, as needed after `to_empty`."""
        self.usual.zero_()

    def forward(self, classification: Tensor, regression: Tensor) -> Tensor:
        """Compute the guided loss, scalar."""
        return torch.add(*self.terms(classification, regression))


def _require_terms(classification: Tensor, regression: Tensor) -> None:
    for name, loss in (("classification", classification), ("regression", regression)):
        if loss.numel() != 1:
            raise ValueError(f"{name} must be a scalar, got {list(loss.shape)}")


def _require_weights(cls_weight: float, reg_weight: float) -> None:
    for name, weight in (("cls_weight", cls_weight), ("reg_weight", reg_weight)):
        if not weight > 0:
            raise ValueError(f"{name} must be positive, got {weight}")


@torch.no_grad()
def _sum_over_ranks(
    classification: Tensor, regression: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """Sum `L_cls` and `w_reg L_reg` over ranks: float64 `[2]`."""
    both = torch.stack([classification.view(()).double(), regression.view(()).double()])
    if group is not None:
        dist.all_reduce(both, group=group)  # a ratio of sums is one of means
    return both


@torch.no_grad()
def _ratio(both: Tensor, usual: Tensor) -> Tensor:
    """Compute `r` of this batch, or of the averages where it has no `L_reg`, or 1."""
    here, before = both[1] / both[0], usual[1] / usual[0]
    before = torch.where((usual > 0).all(), before, 1.0)
    return torch.where((both > 0).all(), here, torch.where(both[1] == 0, before, 1.0))


def _scaled(
    classification: Tensor, regression: Tensor, ratio: Tensor, cls_weight: float
) -> GuidedTerms:
    # A denormal classification loss would make the ratio infinite.
    ratio = ratio.clamp(max=torch.finfo(classification.dtype).max).to(classification.dtype)
    return GuidedTerms(cls_weight * ratio * classification, regression)
