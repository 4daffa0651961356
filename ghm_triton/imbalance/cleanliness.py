"""Cleanliness of positive anchors, and the soft labels made of it.

Li et al., 'Learning from Noisy Anchors for One-stage Object Detection' (CVPR 2020;
arXiv 1912.05086). The target of a positive anchor is not 1 but its *cleanliness*: how well the
network classifies and localises the object from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_iou

TOP = 100
ALPHA = 0.5
BACKGROUND = -1


def assign_top_anchors(boxes: Tensor, anchors: Tensor, top: int = TOP) -> Tensor:
    """Assign to each ground truth the `top` anchors by IoU, whatever that IoU is.

    An anchor claimed by several ground truths goes to the one that it overlaps most (of equals,
    the first). Anchors that overlap no box are never assigned, so a small box may have fewer.

    Args:
        boxes: Ground truth, float `[G, 4]`, x1 y1 x2 y2 in pixels.
        anchors: Float `[A, 4]`, likewise.
        top: Number of positives per ground truth, `N`, at least 1.

    Returns:
        int64 `[A]`: the ground truth of each anchor, or `BACKGROUND` (-1).

    Raises:
        ValueError: `top` is less than 1.

    Example:
        >>> import torch
        >>> anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [0, 0, 10, 4]])
        >>> assign_top_anchors(anchors[:1], anchors, top=2).tolist()
        [0, 0, -1]
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    matches = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)
    if not len(boxes) or not len(anchors):
        return matches
    overlap = box_iou(boxes.to(anchors.dtype), anchors)
    best, index = overlap.topk(min(top, len(anchors)), dim=1)
    # Among the claims only: an anchor may overlap a box more that does not claim it.
    claims = torch.zeros_like(overlap).scatter(1, index, best)
    most, owner = claims.max(dim=0)
    return torch.where(most > 0, owner, matches)


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of pairs of boxes, both `[..., 4]`: `[...]` in [0, 1], 0 without area."""
    corner = torch.maximum(a[..., :2], b[..., :2])
    opposite = torch.minimum(a[..., 2:], b[..., 2:])
    shared = (opposite - corner).clamp(min=0).prod(dim=-1)
    areas = [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(dim=-1) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return torch.where(union > 0, shared / union.clamp(min=torch.finfo(a.dtype).tiny), 0.0)


@torch.no_grad()
def cleanliness(loc: Tensor, cls: Tensor, alpha: float = ALPHA) -> Tensor:
    """Compute the soft label of each positive anchor: `c = alpha * loc + (1 - alpha) * cls`.

    Args:
        loc: IoU of each positive's predicted box with its ground truth, `[P]` in [0, 1].
        cls: Its predicted score for the class of that ground truth, `[P]` in [0, 1].
        alpha: Share of the localisation, in [0, 1].

    Returns:
        `[P]` in [0, 1], without gradient.

    Raises:
        ValueError: `alpha` lies outside [0, 1].

    Example:
        >>> import torch
        >>> cleanliness(torch.tensor([0.8]), torch.tensor([0.2])).tolist()
        [0.5]
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    return (alpha * loc + (1 - alpha) * cls).clamp(0.0, 1.0)


def soft_targets(positive: Tensor, clean: Tensor) -> Tensor:
    """Build the labels of all anchors: the cleanliness of positives, 0 for the others.

    Args:
        positive: bool, any shape, with `P` true entries.
        clean: `[P]`, in the order of those entries.

    Returns:
        Float of the shape of `positive`.
    """
    target = torch.zeros(positive.shape, dtype=clean.dtype, device=clean.device)
    target[positive] = clean
    return target
