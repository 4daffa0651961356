"""Decoding of images to upright RGB, and preprocessing to the model's input.

- EXIF orientation is applied: width and height are those a viewer shows.
- 16-bit grey is scaled to 8 bits (`round(x / 257)`), not clipped; of 16-bit colour the high byte is
  kept, as Pillow decodes it.
- Transparency (an alpha channel, a transparent palette entry or colour) is composited on white.
  The fourth byte of a BMP file's pixels is no alpha channel if it is 0 in all of them.
- CMYK and YCbCr are converted to RGB, grey becomes three equal channels.
- Of an animation or a document, the first frame is taken.
- Colour profiles are ignored, as in training.
- 32-bit integers, floats and Lab are refused: their white is not defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from export.card import DetectorCard, Preprocessing
from service.images.header import (
    ImageError,
    ImageHeader,
    UnsupportedImageError,
    damaged,
    open_lazily,
    short_reason,
)
from service.images.headers import measure

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0
_BAND = 64  # rows composited at a time, so that no further full copies are needed

# The transposition that undoes each EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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


def decode(content: bytes, max_pixels: int, header: ImageHeader | None = None) -> Image.Image:
    """Decode an image file.

    Args:
        content: A JPEG, PNG, WebP, BMP, TIFF or GIF file. The format is detected from the bytes.
        max_pixels: Largest number of pixels to decode, compared with the header's before any
            pixel is decoded.
        header: Result of `measure` for this file, if already known.

    Returns:
        The upright image, mode RGB.

    Raises:
        UnsupportedImageError: The format or mode is not supported.
        DamagedImageError: The file is empty, cut short or broken.
        ImageTooLargeError: The image has more than `max_pixels` pixels, or too long a side.
        MemoryError: The process cannot get the memory.
    """
    header = measure(content, max_pixels) if header is None else header
    image: Image.Image = open_lazily(header.essence, header.kind)
    if image.size != (header.width, header.height):
        raise damaged(
            header.kind,
            f"it is {header.width} x {header.height} pixels in one place and"
            f" {image.width} x {image.height} in another",
        )
    try:
        image.load()
        image = _to_rgb(image)  # rebound, so that the source is freed
        turn = _UPRIGHT.get(header.orientation)
        return image if turn is None else image.transpose(turn)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise any exception on broken bytes
        if "out of memory" in str(error):  # as Pillow's decoders report it
            raise MemoryError(str(error)) from error
        raise damaged(header.kind, short_reason(error)) from error


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F", "LAB"):
        raise UnsupportedImageError(
            f"a {image.format} image of mode {image.mode} is not read: the white of 32-bit"
            " integers, floats and Lab is not defined"
        )
    if image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.has_transparency_data and not _has_unused_alpha(image):
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_unused_alpha(image: Image.Image) -> bool:
    """Whether the alpha of a BMP file is 0 everywhere, as many programs write it."""
    return image.format == "BMP" and image.getextrema()[-1] == (0, 0)


def _on_white(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        white = Image.new("RGBA", band.size, "white")
        shown = Image.alpha_composite(white, band.convert("RGBA"))
        rgb.paste(shown.convert("RGB"), (0, top))
    return rgb


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of up to 16 bits so that white is 255."""
    tags = getattr(image, "tag_v2", {})  # TIFF also has 12 bits and inverted grey
    bits = min(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0], 16)
    levels = np.arange(2**16, dtype=np.float32) * np.float32(255 / (2**bits - 1))
    table = np.rint(np.minimum(levels, 255)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        table = 255 - table
    return Image.fromarray(table[np.asarray(image)])
