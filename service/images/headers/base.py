"""The result of reading an image's header, and its errors."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")

# Segments, chunks or blocks read per file. Real files have dozens; a million take a second.
MOST_PARTS = 10_000


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
