"""Preprocessing of images: one geometry for training, evaluation and serving."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F  # noqa: N812 - torchvision's own name


class InputFormat(Protocol):
    """The input of a network, as `DetectorConfig` describes it."""

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""

    @property
    def pad_value(self) -> int:
        """Grey level, 0..255, around a letterboxed image."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Channel means subtracted after scaling grey levels to [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Channel deviations divided by."""


class Letterbox:
    """Resize an image into the network's frame, keeping its aspect ratio, and normalise it.

    The image is resized by `min(H / h, W / w)` (bilinear, antialiased), placed at the top left and
    padded with grey. The HTTP service computes the same without torch, bit for bit.

    Args:
        config: Gives `image_size`, `pad_value`, `mean` and `std`.
    """

    def __init__(self, config: InputFormat) -> None:
        self.size = config.image_size
        self.pad_value = config.pad_value
        self.mean = np.array(config.mean, dtype=np.float32)
        self.std = np.array(config.std, dtype=np.float32)

    def __call__(self, image: Image.Image) -> tuple[Tensor, tuple[float, float]]:
        """Letterbox an RGB image.

        Returns:
            float32 `[3, H, W]`, normalised; and the scales `(x, y)` from image to input pixels.

        Raises:
            ValueError: The image is not RGB or has no pixels.
        """
        if image.mode != "RGB" or min(image.size) < 1:
            raise ValueError(f"expected an RGB image, got {image.mode} of {image.size}")
        height, width = self.size
        scale = min(width / image.width, height / image.height)
        resized = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        scales = (resized[0] / image.width, resized[1] / image.height)
        if resized != image.size:
            image = F.resize(image, [resized[1], resized[0]])
        padding = [0, 0, width - resized[0], height - resized[1]]
        grey = np.asarray(F.pad(image, padding, fill=self.pad_value), dtype=np.float32)
        normalised = (grey / np.float32(255) - self.mean) / self.std
        tensor = torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))
        return tensor, scales


def flip(
    image: Tensor, boxes: Tensor, *, horizontal: bool, vertical: bool
) -> tuple[Tensor, Tensor]:
    """Mirror a letterboxed image `[3, H, W]` and its boxes `[N, 4]`."""
    height, width = image.shape[-2:]
    x1, y1, x2, y2 = boxes.unbind(-1)
    if horizontal:
        image, x1, x2 = image.flip(-1), width - x2, width - x1
    if vertical:
        image, y1, y2 = image.flip(-2), height - y2, height - y1
    return image, torch.stack([x1, y1, x2, y2], dim=-1)
