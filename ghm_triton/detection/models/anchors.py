"""Anchors of a detector whose input has one fixed size: made once, by torchvision."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

ASPECT_RATIOS = (0.5, 1.0, 2.0)


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
