"""OHEM: learn from the samples with the largest losses alone (arXiv 1604.03540)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ghm_triton.imbalance.samples import require_keep, require_samples

KEEP = 64  # 128 for two images
SAME_REGION = 0.7  # IoU from which two regions see the same


def hard_examples(
    losses: Tensor,
    keep: int = KEEP,
    valid: Tensor | None = None,
    *,
    boxes: Tensor | None = None,
    iou_threshold: float = SAME_REGION,
) -> Tensor:
    """The `keep` samples of each image with the largest losses (arXiv 1604.03540, section 4).

    There is no ratio of foreground to background. No gradient flows through the choice.

    Args:
        losses: `[..., A]`, one loss a sample; each row is an image with samples of its own. A NaN
            counts as the largest, so that it is not hidden.
        keep: Samples kept of a row, `B / N` of the paper.
        valid: bool `[..., A]`: samples that may be kept; None for all.
        boxes: `[..., A, 4]`, x1 y1 x2 y2. Given, samples that overlap one of a larger loss are
            left out first, by NMS with the loss as score: regions that see the same thing would
            otherwise be learnt from several times. Waits for a GPU.
        iou_threshold: Overlap from which they are left out, in [0, 1].

    Returns:
        bool `[..., A]`, at most `keep` a row: fewer where fewer are valid.

    Raises:
        ValueError: A shape does not fit, or a number is out of range.

    Example:
        >>> hard_examples(torch.tensor([[0.1, 3.0, 0.5, 2.0]]), keep=2)
        tensor([[False,  True, False,  True]])
    """
    require_keep(keep)
    losses = losses.detach()
    allowed = torch.ones_like(losses, dtype=torch.bool) if valid is None else valid
    require_samples("valid", allowed, losses)
    if boxes is not None:
        allowed = distinct(losses, boxes, allowed, iou_threshold)
    score = losses.masked_fill(~allowed, -torch.inf)
    best = score.topk(min(keep, score.shape[-1]), dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, best, True) & allowed


def distinct(
    losses: Tensor, boxes: Tensor, valid: Tensor, iou_threshold: float = SAME_REGION
) -> Tensor:
    """The samples that overlap none of a larger loss: NMS with the loss as score.

    Args:
        losses: `[..., A]`, one loss a sample; each row is an image with samples of its own.
        boxes: `[..., A, 4]`, x1 y1 x2 y2.
        valid: bool `[..., A]`: samples that take part.
        iou_threshold: Overlap from which a sample is left out, in [0, 1].

    Returns:
        bool `[..., A]`, false where not `valid`.

    Raises:
        ValueError: A shape does not fit, or the threshold is out of range.
    """
    from torchvision.ops import nms  # of the extra `train`

    if boxes.shape != (*losses.shape, 4):
        raise ValueError(f"boxes must be {[*losses.shape, 4]}, got {list(boxes.shape)}")
    if not 0.0 <= iou_threshold <= 1.0:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
    shape = (losses.shape[:-1].numel(), losses.shape[-1])
    left = torch.zeros(shape, dtype=torch.bool, device=losses.device)
    rows = zip(
        left, losses.reshape(shape), boxes.reshape(*shape, 4), valid.reshape(shape), strict=True
    )
    for kept, loss, box, own_valid in rows:
        own = torch.nonzero(own_valid).squeeze(1)
        kept[own[nms(box[own].float(), loss[own].float(), iou_threshold)]] = True
    return left.view(losses.shape)


class OHEM(nn.Module):
    """OHEM as a module: the losses of samples in, which of them to learn from out.

    Args:
        keep: Samples kept of an image.
        iou_threshold: Leave out samples that overlap a harder one by this much (the paper: 0.7,
            for regions); None keeps them, and `boxes` are not needed.

    Example:
        >>> from ghm_triton import FocalLoss
        >>> from ghm_triton.imbalance.samples import cross_entropy_of_samples
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
        """Choose by the sum of both losses.

        Args:
            classification: `[..., A]`.
            localization: `[..., A]`, 0 for background; or None.
            valid: bool `[..., A]`, or None.
            boxes: `[..., A, 4]` where `iou_threshold` is given.

        Returns:
            bool `[..., A]`; see `hard_examples`.

        Raises:
            ValueError: As `hard_examples`; or an `iou_threshold` without boxes.
        """
        losses = classification.detach()
        if localization is not None:
            require_samples("localization", localization, losses)
            losses = losses + localization.detach()
        if self.iou_threshold is None:
            return hard_examples(losses, self.keep, valid)
        if boxes is None:
            raise ValueError(f"iou_threshold={self.iou_threshold} needs boxes, got None")
        return hard_examples(
            losses, self.keep, valid, boxes=boxes, iou_threshold=self.iou_threshold
        )
