"""Training without sampling: the optimal prior, and guided loss (arXiv 1909.04868)."""

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
MEMORY = 0.9  # of the guide, for a batch without positives


@runtime_checkable
class Assigner(Protocol):
    """What says which place learns which class, as dense detectors do."""

    def labels(self, targets: list[Target]) -> Tensor:
        """int64 `[B, A]`: `C` is background, negative is ignored."""
        ...


def count_priors(
    detector: Assigner, targets: Iterable[list[Target]], class_names: Sequence[str]
) -> ClassStatistics:
    """What a detector's assigner makes of some images, counted without its network.

    Args:
        detector: Gives labels to targets.
        targets: Batches of targets: `boxes` `[N, 4]` in input pixels, `labels` int64 `[N]`, and
            optionally `ignore` bool `[N]`.
        class_names: The classes in label order.

    Returns:
        Statistics with `anchors` (`N`: positive and negative ones) and `positives` by class (whose
        sum is `N_f`).
    """
    statistics = ClassStatistics(tuple(class_names))
    with torch.no_grad():
        for batch in targets:
            labels = detector.labels(batch)
            slots = labels[labels >= 0].flatten()
            statistics.add_labels(torch.bincount(slots, minlength=len(class_names) + 1))
    return statistics


def optimal_prior(positives: int, counted: int, classes: int) -> float:
    r"""The foreground probability to start from: `pi* = N_f / (N C)`.

    It minimises the loss at the start, a positive's `-log(pi)` and its share of all negatives'
    `-(N C / N_f - 1) log(1 - pi)`.

    Args:
        positives: `N_f`, anchors assigned to a class.
        counted: `N`, anchors that are positive or negative; not the ignored ones.
        classes: `C`.

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
    """The bias at which a sigmoid says `prior`: `-log(1 / pi - 1)`.

    Raises:
        ValueError: The prior does not lie in (0, 1).
    """
    return -math.log((1 - _require_prior(prior)) / prior)


class InitialLoss(NamedTuple):
    """Cross entropy a positive at the start, of itself and of the negatives that come with it."""

    foreground: float
    background: float


def initial_loss(prior: float, *, positives: int, counted: int, classes: int) -> InitialLoss:
    """What a detector that says `prior` everywhere loses, divided by its positives.

    Args:
        prior: In (0, 1).
        positives: As in `optimal_prior`.
        counted: As in `optimal_prior`.
        classes: As in `optimal_prior`.

    Returns:
        `-log(pi)` and `-(N C / N_f - 1) log(1 - pi)`.

    Raises:
        ValueError: As `optimal_prior`.
    """
    negatives = 1 / optimal_prior(positives, counted, classes) - 1
    return InitialLoss(-math.log(_require_prior(prior)), -negatives * math.log1p(-prior))


def _require_prior(prior: float) -> float:
    if not 0.0 < prior < 1.0:
        raise ValueError(f"prior must lie in (0, 1), got {prior}")
    return prior


class GuidedTerms(NamedTuple):
    """`w_cls r L_cls` and `w_reg L_reg`, scalars; their sum is the guided loss."""

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

    .. math:: L = w_{reg} L_{reg} + w_{cls} \, r \, L_{cls}, \quad
              r = \frac{w_{reg} L_{reg}}{L_{cls}}

    No gradient flows through `r`. It is 1 where it would be meaningless: for `L_cls = 0`, where the
    released code divides by 0, and for `L_reg = 0`, as in a batch without positives, where it
    would take the gradient from every negative. Such a batch is louder than the others then:
    `GuidedLoss` remembers what `r` was in those before.

    Args:
        classification: `L_cls`, scalar, at least 0.
        regression: `L_reg`, scalar, at least 0.
        cls_weight: `w_cls`.
        reg_weight: `w_reg`.
        process_group: Ranks whose losses are averaged to form one `r`, as gradients are averaged;
            every rank must make the call.

    Returns:
        Both terms. What is NaN or infinite stays so.

    Raises:
        ValueError: A loss is not a scalar, or a weight is not positive.
    """
    _require_terms(classification, regression)
    _require_weights(cls_weight, reg_weight)
    place = reg_weight * regression
    both = _of_all_ranks(classification, place, process_group)
    return _scaled(classification, place, _ratio(both, torch.ones_like(both)), cls_weight)


class GuidedLoss(SharedState):
    r"""Guided loss as a module; see `guided`.

    A batch without positives has no `L_reg` to be scaled to. It is scaled by
    `r = \sum w_{reg} L_{reg} / \sum L_{cls}` over the batches before it, of which each counts nine
    tenths of the next; by 1 before there was any. Only batches in training mode are remembered.

    Args:
        cls_weight: `w_cls`, positive.
        reg_weight: `w_reg`, positive.
        process_group: Ranks that share one ratio.

    Raises:
        ValueError: A weight is not positive.

    Attributes:
        usual: float32 `[2]`, `L_cls` and `w_reg L_reg` of those batches; zeros before the first.
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
        """Both terms of the loss."""
        _require_terms(classification, regression)
        place = self.reg_weight * regression
        both = _of_all_ranks(classification, place, self.process_group)
        self.usual = self.usual.to(both.device)  # once, for a guide that was left on the CPU
        ratio = _ratio(both, self.usual.double())
        if self.training:
            self._remember(both)
        return _scaled(classification, place, ratio, self.cls_weight)

    @torch.no_grad()
    def _remember(self, both: Tensor) -> None:
        # Neither sum is divided by how many it is of: their ratio is what is asked for.
        after = MEMORY * self.usual + (1 - MEMORY) * both.float()
        sound = torch.isfinite(after).all() & (both > 0).all()
        self.usual.copy_(torch.where(sound, after, self.usual))

    def reset_parameters(self) -> None:
        """Forget every batch, as after `to_empty`."""
        self.usual.zero_()

    def forward(self, classification: Tensor, regression: Tensor) -> Tensor:
        """The guided loss, scalar."""
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
def _of_all_ranks(classification: Tensor, place: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`L_cls` and `w_reg L_reg`, summed over ranks: float64 `[2]`."""
    both = torch.stack([classification.view(()).double(), place.view(()).double()])
    if group is not None:
        dist.all_reduce(both, group=group)  # a ratio of sums is one of means
    return both


@torch.no_grad()
def _ratio(both: Tensor, usual: Tensor) -> Tensor:
    """`r`: of this batch; of the usual one where this has no `L_reg`; 1 where neither has."""
    here, before = both[1] / both[0], usual[1] / usual[0]
    before = torch.where((usual > 0).all(), before, 1.0)
    return torch.where((both > 0).all(), here, torch.where(both[1] == 0, before, 1.0))


def _scaled(classification: Tensor, place: Tensor, ratio: Tensor, cls_weight: float) -> GuidedTerms:
    # A classification loss as small as a denormal would make it infinite.
    ratio = ratio.clamp(max=torch.finfo(classification.dtype).max).to(classification.dtype)
    return GuidedTerms(cls_weight * ratio * classification, place)
