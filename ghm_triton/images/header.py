"""The header of an image file, its errors, and opening a file without decoding it."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageFile, UnidentifiedImageError

# Pillow warns per broken entry of a file: a request could write a thousand lines into the log.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")

# Segments, chunks or blocks read per file. Real files have dozens; a million take a second.
MOST_PARTS = 10_000

# Pillow refuses images of more pixels itself.
MOST_PIXELS = 2 * 89_478_485

# Pixels of a side: the most that JPEG and GIF can have. Each row costs memory of its own.
MOST_SIDE = 65_535


class ImageError(ValueError):
    """An image file that cannot be decoded."""


class UnsupportedImageError(ImageError):
    """Not an image, or not of a supported format."""


class DamagedImageError(ImageError):
    """An image of a supported format that is cut short or does not decode."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than allowed, or costlier to decode than any real file."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Properties of an image file, read without decoding it.

    Attributes:
        kind: One of `FORMATS`.
        width: Stored columns, before EXIF orientation is applied.
        height: Stored rows.
        decoded_bytes: Upper bound of the peak memory of decoding to upright RGB.
        essence: The file reduced to what decoding needs.
        orientation: EXIF orientation, 1 to 8; 1 is upright.
        min_bytes: Lower bound of the size of a file with this many pixels.
    """

    kind: str
    width: int
    height: int
    decoded_bytes: int
    essence: bytes = field(repr=False)
    orientation: int = 1
    min_bytes: int = 0


def damaged(kind: str, reason: str) -> DamagedImageError:
    """Return the error for a damaged file."""
    return DamagedImageError(f"the {kind} image is damaged: {reason}")


def too_many_parts(kind: str) -> ImageTooLargeError:
    """Return the error for a file with more than `MOST_PARTS` parts."""
    return ImageTooLargeError(
        f"the {kind} image has more than {MOST_PARTS} parts; no more are read"
    )


def open_lazily(source: bytes | Path, kind: str) -> ImageFile.ImageFile:
    """Open an image file of a format, given by its content or path, without decoding it.

    Raises:
        DamagedImageError: The header is broken, or of a variant that Pillow does not read.
        ImageTooLargeError: The image exceeds Pillow's own limit of pixels.
    """
    try:
        content = io.BytesIO(source) if isinstance(source, bytes) else source
        return Image.open(content, formats=(kind.upper(),))
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(f"the {kind} image is too large: {error}") from error
    except UnidentifiedImageError as error:  # its own message shows the address of a buffer
        raise damaged(kind, "its header is broken, or of a variant that is not read") from error
    except MemoryError:
        raise
    except Exception as error:  # decoders raise any exception on broken bytes
        raise damaged(kind, short_reason(error)) from error


def short_reason(error: Exception) -> str:
    """Return the first line of an error, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
