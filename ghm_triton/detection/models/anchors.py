"""Anchors of a detector with one input size, and the labels assigned to them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

ASPECT_RATIOS = (0.5, 1.0, 2.0)
BETWEEN_THRESHOLDS = -2  # torchvision's Matcher: neither foreground nor background


def level_sizes(image_size: tuple[int, int], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """Height and width of every pyramid level, in cells."""
    height, width = image_size
    return [(math.ceil(height / s), math.ceil(width / s)) for s in strides]


def make_anchors(
    generator: AnchorGenerator, image_size: tuple[int, int], strides: tuple[int, ...]
) -> Tensor:
    """The anchors of all levels, finest first, float32 `[A, 4]`, x1 y1 x2 y2 in input pixels."""
    levels = [torch.zeros(1, 1, *size) for size in level_sizes(image_size, strides)]
    images = ImageList(torch.zeros(1, 3, *image_size), [image_size])
    anchors: Tensor = generator(images, levels)[0]
    return anchors


def without_ignored(matches: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Exclude anchors whose box is to be ignored from the loss.

    Args:
        matches: Index of each anchor's box, int64 `[A]`; negative for none.
        target: Optionally with `ignore`, bool `[N]`.

    Returns:
        The matches, `BETWEEN_THRESHOLDS` where the box is ignored.
    """
    if "ignore" not in target or not len(target["ignore"]):
        return matches
    hidden = (matches >= 0) & target["ignore"][matches.clamp(min=0)]
    return matches.masked_fill(hidden, BETWEEN_THRESHOLDS)


def assigned_labels(
    targets: list[dict[str, Tensor]], matched_idxs: list[Tensor], num_classes: int
) -> Tensor:
    """Class of every anchor, int64 `[B, A]`: `num_classes` is background, -1 is ignored.

    Args:
        targets: One dict per image, with `labels` int64 `[N]`.
        matched_idxs: Per image, the index of each anchor's box, int64 `[A]`: -1 for background,
            `BETWEEN_THRESHOLDS` for neither.
        num_classes: Foreground classes, `C`.
    """
    rows = []
    for target, matches in zip(targets, matched_idxs, strict=True):
        row = torch.full_like(matches, num_classes)
        if len(target["labels"]):
            row = torch.where(matches >= 0, target["labels"][matches.clamp(min=0)], row)
        rows.append(row.masked_fill(matches == BETWEEN_THRESHOLDS, -1))
    return torch.stack(rows)
