"""Preprocessing of decoded images to the model's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.card import DetectorCard, Preprocessing


@dataclass(frozen=True)
class Geometry:
    """Position of an image in the model's input: its upper left corner, resized.

    Attributes:
        width: Width of the image, in pixels.
        height: Height of the image, in pixels.
        resized_width: Width of the image inside the input.
        resized_height: Height of the image inside the input.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int

    def to_image(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Map boxes from input pixels to image pixels, clipped to the image.

        Args:
            boxes: float32 `[N, 4]`, x1, y1, x2, y2 in pixels of the model's input.

        Returns:
            float64 `[N, 4]`, x in [0, width] and y in [0, height].
        """
        scale_x = self.resized_width / self.width
        scale_y = self.resized_height / self.height
        scale = np.array([scale_x, scale_y, scale_x, scale_y])
        limit = np.array([self.width, self.height, self.width, self.height], dtype=np.float64)
        inside: npt.NDArray[np.float64] = np.clip(boxes.astype(np.float64) / scale, 0.0, limit)
        return inside


def prepare_bytes(card: DetectorCard) -> int:
    """Return an upper bound of the memory of `prepare` beyond that of `decode`.

    Per pixel of the model's input: the row (12 bytes, or 3 for uint8), the resized image and a
    pass of it (4 each), and its bytes while they are copied (6).
    """
    pixels = card.preprocessing.width * card.preprocessing.height
    return pixels * (17 if card.input == "uint8" else 26)


def prepare(image: Image.Image, card: DetectorCard) -> tuple[npt.NDArray[Any], Geometry]:
    """Convert an image to a row of the model's input.

    Images for a graph with uint8 input are letterboxed too, which the graph then leaves unchanged:
    images of different sizes can share a batch, and a large image is held once. The results are
    those of the float32 graph.

    Args:
        image: Mode RGB.
        card: The model's card.

    Returns:
        float32 `[3, H, W]` or uint8 `[H, W, 3]`, and the geometry that maps boxes back to the
        image.

    Raises:
        ValueError: The image is not RGB.
    """
    fit = canvas if card.input == "uint8" else letterbox
    return fit(image, card.preprocessing)


def letterbox(
    image: Image.Image, preprocessing: Preprocessing
) -> tuple[npt.NDArray[np.float32], Geometry]:
    """Letterbox and normalise an image.

    Args:
        image: Mode RGB.
        preprocessing: Preprocessing of the card.

    Returns:
        float32 `[3, H, W]`, and the geometry that maps boxes back to the image.

    Raises:
        ValueError: The image is not RGB.
    """
    resized, geometry = _fit(image, preprocessing)
    pixels = np.asarray(resized)
    height, width = pixels.shape[:2]
    row = np.empty((3, preprocessing.height, preprocessing.width), dtype=np.float32)
    grey = np.float32(255)
    # Per channel and in place: five passes over a plane that stays in the cache.
    for channel, plane in enumerate(row):
        mean = np.float32(preprocessing.mean[channel])
        std = np.float32(preprocessing.std[channel])
        plane.fill((np.float32(preprocessing.pad_value) / grey - mean) / std)
        inside = plane[:height, :width]
        np.divide(pixels[..., channel], grey, out=inside, dtype=np.float32)
        np.subtract(inside, mean, out=inside)
        np.divide(inside, std, out=inside)
    return row, geometry


def canvas(
    image: Image.Image, preprocessing: Preprocessing
) -> tuple[npt.NDArray[np.uint8], Geometry]:
    """Letterbox an image without normalising it.

    Args:
        image: Mode RGB.
        preprocessing: Preprocessing of the card.

    Returns:
        uint8 `[H, W, 3]`, and the geometry that maps boxes back to the image.

    Raises:
        ValueError: The image is not RGB.
    """
    resized, geometry = _fit(image, preprocessing)
    shape = (preprocessing.height, preprocessing.width, 3)
    frame = np.full(shape, preprocessing.pad_value, dtype=np.uint8)
    frame[: resized.height, : resized.width] = np.asarray(resized)
    return frame, geometry


def _fit(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, Geometry]:
    """Resize an image to its size inside the model's input."""
    if image.mode != "RGB":
        raise ValueError(f"the image's mode must be RGB, got {image.mode}")
    size = preprocessing.resized(image.width, image.height)
    geometry = Geometry(image.width, image.height, *size)
    if size == image.size:
        return image, geometry
    return image.resize(size, Image.Resampling.BILINEAR), geometry
