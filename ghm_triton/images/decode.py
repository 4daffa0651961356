"""Decoding of images to upright RGB, alike for data sets and for the service.

- EXIF orientation is applied: width and height are those a viewer shows.
- 16-bit grey is scaled to 8 bits (`round(x / 257)`), not clipped; of 16-bit colour the high byte is
  kept, as Pillow decodes it.
- Transparency (an alpha channel, a transparent palette entry or colour) is composited on white.
  The fourth byte of a BMP file's pixels is no alpha channel if it is 0 in all of them.
- CMYK and YCbCr are converted to RGB, grey becomes three equal channels.
- Of an animation or a document, the first frame is taken.
- Colour profiles and orientation in XMP are ignored.
- 32-bit integers, floats and Lab are refused: their white is not defined.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ghm_triton.images.header import (
    MOST_PIXELS,
    ImageError,
    ImageHeader,
    UnsupportedImageError,
    damaged,
    open_lazily,
    short_reason,
)
from ghm_triton.images.headers import kind_of, measure
from ghm_triton.images.tiff import orientation_of

_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0
_BAND = 2**16  # pixels composited at a time, so that no further full copies are needed

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


def decode(
    content: bytes, max_pixels: int = MOST_PIXELS, header: ImageHeader | None = None
) -> Image.Image:
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
    with _decoding(header.kind):
        image = _to_rgb(_loaded(header))
        turn = _UPRIGHT.get(header.orientation)
        return image if turn is None else image.transpose(turn)


def check_decodes(header: ImageHeader) -> None:
    """Raise what `decode` would, at an eighth of its work for JPEG files."""
    with _decoding(header.kind):
        _check_mode(_loaded(header, draft=True))


def peek(path: Path) -> tuple[tuple[int, int], int]:
    """Return the stored width and height of an image file, and its orientation, from its head.

    Faster than `measure`, which reads the whole file. An orientation behind the pixels of a PNG
    file is not seen.

    Raises:
        OSError: The file cannot be read.
        ImageError: As of `decode`, as far as the head shows it.
    """
    with path.open("rb") as stream:
        kind = kind_of(stream.read(16))
    with open_lazily(path, kind) as image:
        _check_mode(image)
        exif = image.info.get("exif", b"") if kind != "TIFF" else b""  # see `tiff.read`
        return image.size, orientation_of(exif.removeprefix(b"Exif\0\0"))


@contextmanager
def _decoding(kind: str) -> Iterator[None]:
    """Raise any exception of Pillow's decoders as a `DamagedImageError` or a `MemoryError`."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise any exception on broken bytes
        if "out of memory" in str(error):  # as Pillow's decoders report it
            raise MemoryError(str(error)) from error
        raise damaged(kind, short_reason(error)) from error


def _loaded(header: ImageHeader, *, draft: bool = False) -> ImageFile.ImageFile:
    image = open_lazily(header.essence, header.kind)
    if image.size != (header.width, header.height):
        raise damaged(
            header.kind,
            f"it is {header.width} x {header.height} pixels in one place and"
            f" {image.width} x {image.height} in another",
        )
    if draft:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    return image


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F", "LAB"):
        raise UnsupportedImageError(
            f"a {image.format} image of mode {image.mode} is not read: the white of 32-bit"
            " integers, floats and Lab is not defined"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_mode(image)
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
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
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
