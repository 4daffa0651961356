"""S-OHEM: hard examples, stratified by the share of each loss (arXiv 1705.02233)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ghm_triton.imbalance.ohem import (
    KEEP,
    distinct_if_required,
    require_keep,
    require_samples,
)
from ghm_triton.losses.schedule import StrengthSchedule

STRATA = 4
# Not in the paper: the borders of the strata, the quotas and the course of alpha.
QUOTAS = (0.25, 0.25, 0.25, 0.25)
ALPHA, ALPHA_END = 0.75, 0.25


def strata(classification: Tensor, localization: Tensor) -> Tensor:
    """Assign each sample to a stratum by the share of the localisation in its loss.

    Stratum `k` has shares in `[k / 4, (k + 1) / 4)`, stratum 3 up to 1. Stratum 0 is mostly
    classification and contains all background; stratum 3 is mostly localisation.

    Args:
        classification: `alpha * L_cls`, `[..., A]`, at least 0.
        localization: `beta * L_loc`, `[..., A]`, at least 0.

    Returns:
        int64 `[..., A]`. A sample without loss, or with a NaN, belongs to stratum 0.
    """
    share = torch.nan_to_num(localization / (classification + localization), nan=0.0)
    return (share * STRATA).long().clamp(0, STRATA - 1)


def stratified_hard_examples(
    losses: Tensor, stratum: Tensor, quotas: Sequence[int], valid: Tensor | None = None
) -> Tensor:
    """Select the hardest samples of each stratum, up to its quota.

    The unused quota of a stratum with too few samples goes to the hardest of the others, so that
    as many samples are kept as by OHEM.

    Args:
        losses: `[..., A]`, one loss per sample; each row is an image.
        stratum: int64 `[..., A]`, `0..len(quotas) - 1`.
        quotas: Samples kept per stratum.
        valid: bool `[..., A]`: samples that may be kept; None for all.

    Returns:
        bool `[..., A]`, at most `sum(quotas)` per row.

    Raises:
        ValueError: A shape does not agree.
    """
    require_samples("stratum", stratum, losses)
    allowed = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    require_samples("valid", allowed, losses)
    score = losses.detach().masked_fill(~allowed, -torch.inf)
    order = score.argsort(dim=-1, descending=True, stable=True)
    allowed, stratum = allowed.gather(-1, order), stratum.gather(-1, order)
    kept = torch.zeros_like(allowed)
    for number, quota in enumerate(quotas):
        members = allowed & (stratum == number)
        kept |= members & (members.cumsum(dim=-1) <= quota)
    rest = allowed & ~kept
    kept |= rest & (rest.cumsum(dim=-1) <= sum(quotas) - kept.sum(dim=-1, keepdim=True))
    return torch.zeros_like(kept).scatter(-1, order, kept)


class StratifiedOHEM(nn.Module):
    """S-OHEM as a module: selects samples by their losses.

    A sample's loss is `alpha * L_cls + beta * L_loc` with `beta = 1 - alpha`, and `alpha` falls
    during training, so that classification is learnt first and localisation later. Samples fall
    into four strata by the share of localisation, and the hardest of each stratum fill its quota.
    The borders of the strata, equal quotas and the schedule of `alpha` are not in the paper.

    Args:
        steps: Calls over which `alpha` moves; one call per training step.
        keep: Samples kept per image.
        alpha: At the first step, in [0, 1].
        alpha_end: From step `steps` on.
        quotas: Share of `keep` of each stratum; at least 0, with sum 1.
        iou_threshold: Leave out samples that overlap a harder one by this much, before they fall
            into strata (0.7 in OHEM, for regions); None keeps them, and needs no `boxes`.

    Attributes:
        updates: int64 scalar, training-mode calls so far; in the `state_dict`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> import torch
        >>> miner = StratifiedOHEM(steps=1000, keep=16)
        >>> chosen = miner(torch.rand(2, 100), torch.rand(2, 100))
        >>> chosen.sum(dim=1).tolist()
        [16, 16]
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
        """Return the weight of the classification at the next call, float32 scalar."""
        return self.schedule.at(self.updates)

    def forward(
        self,
        classification: Tensor,
        localization: Tensor,
        valid: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Select samples, and in training mode advance `alpha`.

        Args:
            classification: `L_cls`, `[..., A]`.
            localization: `L_loc`, `[..., A]`, 0 for background.
            valid: bool `[..., A]`, or None.
            boxes: `[..., A, 4]`; required with `iou_threshold`.

        Returns:
            bool `[..., A]`; see `stratified_hard_examples`.

        Raises:
            ValueError: A shape does not agree, or `boxes` are missing.
        """
        require_samples("localization", localization, classification)
        alpha = self.alpha()
        classification = alpha * classification.detach()
        localization = (1 - alpha) * localization.detach()
        losses = classification + localization
        valid = distinct_if_required(losses, boxes, valid, self.iou_threshold)
        if self.training:
            self.updates += 1
        stratum = strata(classification, localization)
        return stratified_hard_examples(losses, stratum, self.quotas, valid)


def allot(keep: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Divide `keep` into whole quotas by the largest remainder.

    Raises:
        ValueError: The shares are not four, are negative, or do not add up to 1.
    """
    # Shares such as 0.1 + 0.2 + 0.7 do not add up to 1 exactly.
    if len(shares) != STRATA or not min(shares) >= 0 or not abs(sum(shares) - 1) < 1e-6:
        raise ValueError(f"quotas must be {STRATA} shares with sum 1, got {tuple(shares)}")
    whole = [int(keep * share) for share in shares]
    neediest = sorted(range(STRATA), key=lambda k: whole[k] - keep * shares[k])
    for stratum in neediest[: keep - sum(whole)]:
        whole[stratum] += 1
    return tuple(whole)
