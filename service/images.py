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

from export.contract import DetectorCard, Preprocessing

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"II+\x00", "TIFF"),
    (b"MM\x00+", "TIFF"),
)

_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0

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


class ImageError(ValueError):
    """The bytes are not an image that can be answered for."""


class UnsupportedImageError(ImageError):
    """Not an image, or not of a kind that is read here."""


class DamagedImageError(ImageError):
    """An image of a known kind that ends too early or does not decode."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than allowed."""


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


def decode(content: bytes, max_pixels: int) -> Image.Image:
    """Decode an image file.

    Args:
        content: The bytes of a JPEG, PNG, WebP, BMP, TIFF or GIF file. The kind is read from
            them, not from what a client calls them.
        max_pixels: The most pixels to decode. What the header states is checked before any
            pixel is decoded.

    Returns:
        The upright image, mode RGB.

    Raises:
        UnsupportedImageError: The bytes are no image of these kinds.
        DamagedImageError: There are no bytes, or the image is cut short or broken.
        ImageTooLargeError: The image has more pixels than allowed.
    """
    if not content:
        raise DamagedImageError("the image is empty: 0 bytes")
    kind = _kind(content)
    image = _open(content, kind, max_pixels)
    if image.width * image.height > max_pixels:
        raise ImageTooLargeError(
            f"the image is {image.width} x {image.height} pixels; at most {max_pixels} are read"
        )
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except ImageError:
        raise
    except Exception as error:  # decoders raise what they please on broken bytes
        raise DamagedImageError(f"the {kind} image is damaged: {_reason(error)}") from error


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
    pixels, geometry = canvas(image, preprocessing)
    mean = np.array(preprocessing.mean, dtype=np.float32)
    std = np.array(preprocessing.std, dtype=np.float32)
    normalized = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(normalized.transpose(2, 0, 1)), geometry


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
    if image.mode != "RGB":
        raise ValueError(f"the image's mode must be RGB, got {image.mode}")
    size = preprocessing.resized(image.width, image.height)
    background = (preprocessing.pad_value,) * 3
    frame = Image.new("RGB", (preprocessing.width, preprocessing.height), background)
    frame.paste(image.resize(size, Image.Resampling.BILINEAR), (0, 0))
    return np.asarray(frame), Geometry(image.width, image.height, *size)


def _kind(content: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if content.startswith(signature):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    raise UnsupportedImageError(f"not an image of a kind read here: {', '.join(FORMATS)}")


def _open(content: bytes, kind: str, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=(kind.upper(),))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"the image is too large: at most {max_pixels} pixels are read"
        ) from error
    except UnidentifiedImageError as error:  # its own message prints the address of a buffer
        raise DamagedImageError(
            f"the {kind} image's header is damaged, or of a variant that is not read"
        ) from error
    except Exception as error:
        raise DamagedImageError(f"the {kind} image is damaged: {_reason(error)}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 where there is none. TIFF files are turned while they load."""
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  broken EXIF beside good pixels: upright, as viewers show it
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F", "LAB"):
        raise UnsupportedImageError(
            f"a {image.format} image of mode {image.mode} is not read: 32-bit integers, floats and"
            " Lab say nothing of which value is white"
        )
    if image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", colours.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of up to 16 bits, scaled so that its white is 255."""
    tags = getattr(image, "tag_v2", {})  # of TIFF, which also knows 12 bits and inverted grey
    bits = tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]
    grey = np.asarray(image).astype(np.float32) * np.float32(255 / (2**bits - 1))
    scaled = np.rint(grey).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
        scaled = 255 - scaled
    return Image.fromarray(scaled)


def _reason(error: Exception) -> str:
    """The first line of an error, short enough to answer with."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
