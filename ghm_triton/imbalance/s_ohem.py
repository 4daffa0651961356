"""S-OHEM: hard examples drawn by the kind of loss that makes them hard (arXiv 1705.02233)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghm_triton.imbalance.ohem import KEEP, distinct
from ghm_triton.imbalance.samples import require_keep, require_samples
from ghm_triton.losses.schedule import StrengthSchedule

STRATA = 4
# Ours: the borders of the strata, the quotas and the course of alpha.
QUOTAS = (0.25, 0.25, 0.25, 0.25)
ALPHA, ALPHA_END = 0.75, 0.25


def strata(classification: Tensor, localization: Tensor) -> Tensor:
    """Which stratum each sample is of, by the share of the localisation in its loss.

    Stratum `k` has shares in `[k / 4, (k + 1) / 4)`; 0 is almost all classification, and all
    background; 3, up to a share of 1, is almost all localisation.

    Args:
        classification: `alpha * L_cls`, `[..., A]`, at least 0.
        localization: `beta * L_loc`, `[..., A]`, at least 0.

    Returns:
        int64 `[..., A]`. A sample without loss, or with a NaN, is of stratum 0.
    """
    share = torch.nan_to_num(localization / (classification + localization), nan=0.0)
    return (share * STRATA).long().clamp(0, STRATA - 1)


def stratified_hard_examples(
    losses: Tensor, stratum: Tensor, quotas: Sequence[int], valid: Tensor | None = None
) -> Tensor:
    """The hardest samples of every stratum, up to its quota.

    What a stratum has too few samples for goes to the hardest of the others, so that as many are
    kept as by OHEM.

    Args:
        losses: `[..., A]`, one loss a sample; each row is an image.
        stratum: int64 `[..., A]`, `0..len(quotas) - 1`.
        quotas: Samples kept of each stratum.
        valid: bool `[..., A]`: samples that may be kept; None for all.

    Returns:
        bool `[..., A]`, at most `sum(quotas)` a row.

    Raises:
        ValueError: A shape does not fit.
    """
    require_samples("stratum", stratum, losses)
    allowed = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    require_samples("valid", allowed, losses)
    score = losses.detach().masked_fill(~allowed, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    allowed, stratum = allowed.gather(-1, order), stratum.gather(-1, order)
    kept = torch.zeros_like(allowed)
    for number, quota in enumerate(quotas):
        own = allowed & (stratum == number)
        kept |= own & (own.cumsum(dim=-1) <= quota)
    rest = allowed & ~kept
    kept |= rest & (rest.cumsum(dim=-1) <= sum(quotas) - kept.sum(dim=-1, keepdim=True))
    return torch.zeros_like(kept).scatter(-1, order, kept)


class StratifiedOHEM(nn.Module):
    """S-OHEM as a module: the losses of samples in, which of them to learn from out.

    A sample's loss is `alpha * L_cls + beta * L_loc` with `beta = 1 - alpha`, and `alpha` falls
    over training: classification is to be learnt first, localisation later. Samples fall into
    four strata by the share of localisation, and each stratum's hardest fill its quota. The
    borders of the strata, equal quotas and the course of `alpha` are this package's choice.

    Args:
        steps: Calls over which `alpha` moves; one call a training step.
        keep: Samples kept of an image.
        alpha: At the first step, in [0, 1].
        alpha_end: From step `steps` on.
        quotas: Share of `keep` that is each stratum's own; at least 0, with sum 1.
        iou_threshold: Leave out samples that overlap a harder one by this much, before they fall
            into strata (OHEM's 0.7, for regions); None keeps them, and `boxes` are not needed.

    Attributes:
        updates: int64 scalar, training-mode calls so far; in the `state_dict`.

    Raises:
        ValueError: An argument is out of range.
    """

    updates: Tensor

    def __init__(
        self,
        steps: int,
        keep: int = KEEP,
        alpha: float = ALPHA,
        alpha_end: float = ALPHA_END,
        quotas: Sequence[float] = QUOTAS,
        iou_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.iou_threshold = iou_threshold
        self.keep = require_keep(keep)
        self.schedule = StrengthSchedule(alpha, alpha_end, steps)
        self.quotas = allot(keep, quotas)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def alpha(self) -> Tensor:
        """Weight of the classification at the next call, float32 scalar."""
        return self.schedule.at(self.updates)

    def forward(
        self,
        classification: Tensor,
        localization: Tensor,
        valid: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Choose, and in training mode move `alpha` on.

        Args:
            classification: `L_cls`, `[..., A]`.
            localization: `L_loc`, `[..., A]`, 0 for background.
            valid: bool `[..., A]`, or None.
            boxes: `[..., A, 4]` where `iou_threshold` is given.

        Returns:
            bool `[..., A]`; see `stratified_hard_examples`.

        Raises:
            ValueError: A shape does not fit; or an `iou_threshold` without boxes.
        """
        require_samples("localization", localization, classification)
        alpha = self.alpha()
        of_class = alpha * classification.detach()
        of_place = (1 - alpha) * localization.detach()
        losses = of_class + of_place
        if self.iou_threshold is not None:
            if boxes is None:
                raise ValueError(f"iou_threshold={self.iou_threshold} needs boxes, got None")
            everything = torch.ones_like(losses, dtype=torch.bool)
            valid = distinct(
                losses, boxes, everything if valid is None else valid, self.iou_threshold
            )
        if self.training:
            self.updates += 1
        return stratified_hard_examples(losses, strata(of_class, of_place), self.quotas, valid)


def allot(keep: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Whole quotas with sum `keep`, by largest remainder.

    Raises:
        ValueError: The shares are not four, are negative, or do not add up to 1.
    """
    # Shares such as 0.1 + 0.2 + 0.7 are rounded.
    if len(shares) != STRATA or not min(shares) >= 0 or not abs(sum(shares) - 1) < 1e-6:
        raise ValueError(f"quotas must be {STRATA} shares with sum 1, got {tuple(shares)}")
    whole = [int(keep * share) for share in shares]
    neediest = sorted(range(STRATA), key=lambda k: whole[k] - keep * shares[k])
    for stratum in neediest[: keep - sum(whole)]:
        whole[stratum] += 1
    return tuple(whole)
