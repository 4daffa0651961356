"""OHEM and S-OHEM: training on the samples with the largest losses.

OHEM is arXiv 1604.03540; S-OHEM (arXiv 1705.02233) stratifies by the share of each loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ghm_triton.losses.schedule import StrengthSchedule
from ghm_triton.reference.losses import EXACT_UNTIL

KEEP = 64  # 128 for two images
SAME_REGION = 0.7  # IoU from which two regions count as the same
STRATA = 4
# Not in the paper: the borders of the strata, the quotas and the course of alpha.
QUOTAS = (0.25, 0.25, 0.25, 0.25)
ALPHA, ALPHA_END = 0.75, 0.25


def cross_entropy_of_samples(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Binary cross entropy of each sample, summed over its classes.

    $$ L_i = \sum_c \log(1 + e^{u_{ic}}), \quad u_{ic} = (1 - 2 p^*_{ic}) x_{ic} $$

    Args:
        logits: `[..., C]`, floating; arithmetic in float32 (float64 for float64).
        labels: Integer `[...]`: `0..C-1` foreground, `C` background, negative ignored.

    Returns:
        `[...]`, 0 where ignored.

    Raises:
        ValueError: The shapes do not agree.

    Example:
        >>> import torch
        >>> cross_entropy_of_samples(torch.zeros(3, 2), torch.tensor([0, 2, -1]))
        tensor([1.3863, 1.3863, 0.0000])
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels are {list(labels.shape)}, logits {list(logits.shape)}")
    classes = logits.shape[-1]
    u = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    column = labels.clamp(0, classes - 1).unsqueeze(-1)
    foreground = ((labels >= 0) & (labels < classes)).unsqueeze(-1)
    logit = u.gather(-1, column)
    u = u.scatter(-1, column, torch.where(foreground, -logit, logit))
    return torch.where(labels >= 0, softplus(u, threshold=EXACT_UNTIL).sum(dim=-1), 0.0)


def hard_examples(
    losses: Tensor,
    keep: int = KEEP,
    valid: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    iou_threshold: float = SAME_REGION,
) -> Tensor:
    """Select the `keep` samples of each image with the largest losses.

    Section 4 of arXiv 1604.03540. There is no ratio of foreground to background. No gradient flows
    through the selection.

    Args:
        losses: `[..., A]`, one loss per sample; each row is an image. A NaN counts as the largest,
            so that it is not hidden.
        keep: Samples kept per row, `B / N` in the paper.
        valid: bool `[..., A]`: samples that may be kept; None for all.
        boxes: `[..., A, 4]`, x1 y1 x2 y2, or None. With boxes, samples that overlap one with a
            larger loss are left out first, by NMS with the loss as score, so that a region is not
            counted several times. Synchronises with a GPU.
        iou_threshold: Overlap from which they are left out, in [0, 1].

    Returns:
        bool `[..., A]`, at most `keep` per row: fewer where fewer are valid.

    Raises:
        ValueError: A shape does not agree, or a number is out of range.

    Example:
        >>> import torch
        >>> hard_examples(torch.tensor([[0.1, 3.0, 0.5, 2.0]]), keep=2)
        tensor([[False,  True, False,  True]])
    """
    require_keep(keep)
    losses = losses.detach()
    allowed = candidates(losses, valid, boxes, None if boxes is None else iou_threshold)
    score = losses.masked_fill(~allowed, -torch.inf)
    best = score.topk(min(keep, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, best, True) & allowed


class OHEM(nn.Module):
    """OHEM as a module: selects samples by their losses.

    Args:
        keep: Samples kept per image.
        iou_threshold: Leave out samples that overlap a harder one by this much (the paper: 0.7,
            for regions); None keeps them, and needs no `boxes`.

    Raises:
        ValueError: `keep` is not a positive integer.

    Example:
        >>> import torch
        >>> from ghm_triton import FocalLoss
        >>> from ghm_triton.imbalance.ohem import cross_entropy_of_samples
        >>> logits, labels = torch.randn(2, 100, 80), torch.randint(0, 81, (2, 100))
        >>> hard = OHEM(keep=16)(cross_entropy_of_samples(logits, labels), valid=labels >= 0)
        >>> loss = FocalLoss()(logits, labels.masked_fill(~hard, -1))  # negative is ignored
    """

    def __init__(self, keep: int = KEEP, iou_threshold: float | None = None) -> None:
        super().__init__()
        self.keep = require_keep(keep)
        self.iou_threshold = iou_threshold

    def forward(
        self,
        classification: Tensor,
        localization: Tensor | None = None,
        valid: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """Select by the sum of both losses.

        Args:
            classification: `[..., A]`.
            localization: `[..., A]`, 0 for background; or None.
            valid: bool `[..., A]`, or None.
            boxes: `[..., A, 4]`; required with `iou_threshold`.

        Returns:
            bool `[..., A]`; see `hard_examples`.

        Raises:
            ValueError: A shape does not agree, or `boxes` are missing.
        """
        losses = classification.detach()
        if localization is not None:
            require_samples("localization", localization, losses)
            losses = losses + localization.detach()
        return hard_examples(
            losses, self.keep, candidates(losses, valid, boxes, self.iou_threshold)
        )


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
    allowed = candidates(losses, valid, None, None)
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
        valid = candidates(losses, valid, boxes, self.iou_threshold)
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


def candidates(
    losses: Tensor, valid: Tensor | None, boxes: Tensor | None, iou_threshold: float | None
) -> Tensor:
    """Select the valid samples; with `iou_threshold`, those that overlap none with a larger loss.

    This is NMS of each row with the loss as score. Arguments as of `hard_examples`, whose errors
    it raises; `iou_threshold` None needs no boxes.
    """
    allowed = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    require_samples("valid", allowed, losses)
    if iou_threshold is None:
        return allowed
    if boxes is None:
        raise ValueError(f"iou_threshold={iou_threshold} needs boxes, got None")
    if boxes.shape != (*losses.shape, 4):
        raise ValueError(f"boxes must be {[*losses.shape, 4]}, got {list(boxes.shape)}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
    from torchvision.ops import nms  # of the extra `train`

    shape = (losses.shape[:-1].numel(), losses.shape[-1])
    selected = torch.zeros(shape, dtype=torch.bool, device=losses.device)
    rows = (losses.reshape(shape), boxes.reshape(*shape, 4), allowed.reshape(shape))
    for kept, loss, box, row_valid in zip(selected, *rows, strict=True):
        index = torch.nonzero(row_valid).squeeze(1)
        kept[index[nms(box[index].float(), loss[index].float(), iou_threshold)]] = True
    return selected.view(losses.shape)


def require_keep(keep: int) -> int:
    """Return `keep` if it is a positive integer, or raise ValueError."""
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"keep must be an integer of at least 1, got {keep!r}")
    return keep


def require_samples(name: str, values: Tensor, like: Tensor) -> None:
    """Raise ValueError unless `values` has one number for each sample of `like`."""
    if values.shape != like.shape:
        raise ValueError(
            f"{name} must be {list(like.shape)}, one for each sample; got {list(values.shape)}"
        )
