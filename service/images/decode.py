"""From the bytes of an image to one row of the model's input, and from its boxes back.

What every kind of image becomes, so that nothing is left to chance:

- the orientation of EXIF is honoured: width and height are those a viewer shows;
- 16-bit grey is scaled to 8 bits (`round(x / 257)`), never clipped; 16-bit colour keeps the high
  byte, which is what Pillow decodes it to;
- transparency (an alpha channel, a transparent palette entry or colour) is composited on white;
- CMYK and YCbCr are converted to RGB, grey becomes three equal channels;
- of an animation, the first frame is taken;
- colour profiles are ignored, as they are in training;
- 32-bit integers, floats and Lab are refused: nothing says which of their values is white.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from export.card import DetectorCard, Preprocessing
from service.images.headers import (
    FORMATS,
    DamagedImageError,
    ImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
    measure,
)

__all__ = [
    "FORMATS",
    "DamagedImageError",
    "Geometry",
    "ImageError",
    "ImageHeader",
    "ImageTooLargeError",
    "UnsupportedImageError",
    "canvas",
    "decode",
    "letterbox",
    "measure",
    "prepare",
]

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0
_BAND = 64  # rows converted at a time: a conversion costs no second and third copy

# The transposition that undoes each value of EXIF's orientation; 1 is upright.
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
    """Where an image went in the model's input.

    Attributes:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        resized_width: Of the image inside the input, from its left edge.
        resized_height: Of the image inside the input, from its upper edge.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int

    def to_image(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Take boxes from input pixels to image pixels, clipped to the image.

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
        content: The bytes of a JPEG, PNG, WebP, BMP, TIFF or GIF file. The kind is read from
            them, not from what a client calls them.
        max_pixels: The most pixels to decode. What the header states is checked before any
            pixel is decoded.
        header: What `measure` returned for it, if it was asked before.

    Returns:
        The upright image, mode RGB.

    Raises:
        UnsupportedImageError: The bytes are no image of these kinds.
        DamagedImageError: There are no bytes, or the image is cut short or broken.
        ImageTooLargeError: The image has more pixels than allowed.
    """
    header = measure(content, max_pixels) if header is None else header
    try:
        image: Image.Image = Image.open(io.BytesIO(header.essence), formats=(header.kind.upper(),))
        if image.size != (header.width, header.height):
            raise DamagedImageError(
                f"the {header.kind} image is damaged: it is {header.width} x {header.height}"
                f" pixels in one place and {image.width} x {image.height} in another"
            )
        image.load()
        image = _to_rgb(image)  # under the same name, so that what it was made of is freed
        turn = _UPRIGHT.get(header.orientation)
        return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its own message prints the address of a buffer
        raise DamagedImageError(
            f"the {header.kind} image's header is damaged, or of a variant that is not read"
        ) from error
    except Exception as error:  # decoders raise what they please on broken bytes
        raise DamagedImageError(f"the {header.kind} image is damaged: {_reason(error)}") from error


def prepare(image: Image.Image, card: DetectorCard) -> tuple[npt.NDArray[Any], Geometry]:
    """Make an image a row of the model's input, whichever kind of input its card says.

    A graph that takes uint8 images of any size gets them letterboxed all the same, which it then
    leaves as they are: so images of many sizes share a batch, and a large one takes its memory
    once. The answers are those of the graph that takes float32.

    Args:
        image: Mode RGB.
        card: The model's.

    Returns:
        float32 `[3, H, W]` or uint8 `[H, W, 3]`, and the geometry that takes boxes back to the
        image.

    Raises:
        ValueError: The image is not RGB.
    """
    fit = canvas if card.input == "uint8" else letterbox
    return fit(image, card.preprocessing)


def letterbox(
    image: Image.Image, preprocessing: Preprocessing
) -> tuple[npt.NDArray[np.float32], Geometry]:
    """Letterbox and normalise an image, as the card says.

    Args:
        image: Mode RGB.
        preprocessing: The card's.

    Returns:
        float32 `[3, H, W]`, and the geometry that takes boxes back to the image.

    Raises:
        ValueError: The image is not RGB.
    """
    resized, geometry = _fit(image, preprocessing)
    pixels = np.asarray(resized)
    height, width = pixels.shape[:2]
    row = np.empty((3, preprocessing.height, preprocessing.width), dtype=np.float32)
    grey = np.float32(255)
    # A channel at a time and in place: five passes over a plane that stays in the cache.
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
    """Letterbox an image, as the card says, and leave its grey levels.

    Args:
        image: Mode RGB.
        preprocessing: The card's.

    Returns:
        uint8 `[H, W, 3]`, and the geometry that takes boxes back to the image.

    Raises:
        ValueError: The image is not RGB.
    """
    resized, geometry = _fit(image, preprocessing)
    shape = (preprocessing.height, preprocessing.width, 3)
    frame = np.full(shape, preprocessing.pad_value, dtype=np.uint8)
    frame[: resized.height, : resized.width] = np.asarray(resized)
    return frame, geometry


def _fit(image: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, Geometry]:
    """The image as large as it is inside the model's input."""
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
            f"a {image.format} image of mode {image.mode} is not read: 32-bit integers, floats and"
            " Lab say nothing of which value is white"
        )
    if image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        white = Image.new("RGBA", band.size, "white")
        shown = Image.alpha_composite(white, band.convert("RGBA"))
        rgb.paste(shown.convert("RGB"), (0, top))
    return rgb


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits, scaled so that its white is 255."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, which also knows 12 bits and inverted grey
    bits = min(tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0], 16)
    levels = np.arange(2**16, dtype=np.float32) * np.float32(255 / (2**bits - 1))
    table = np.rint(np.minimum(levels, 255)).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        table = 255 - table
    return Image.fromarray(table[np.asarray(image)])


def _reason(error: Exception) -> str:
    """The first line of an error, short enough to answer with."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
