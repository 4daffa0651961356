"""What the readers of headers share: their result, and their errors."""

from __future__ import annotations

from dataclasses import dataclass, field

FORMATS = ("JPEG", "PNG", "WebP", "BMP", "TIFF", "GIF")

# Parts before the pixels, or of them. Honest files have dozens; walking a million takes a second.
MOST_PARTS = 10_000


class ImageError(ValueError):
    """The bytes are not an image that can be answered for."""


class UnsupportedImageError(ImageError):
    """Not an image, or not of a kind that is read here."""


class DamagedImageError(ImageError):
    """An image of a known kind that ends too early or does not decode."""


class ImageTooLargeError(ImageError):
    """An image of more pixels than allowed, or that would cost more than any honest one."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image file says of itself.

    Attributes:
        kind: One of `FORMATS`.
        width: Stored columns, before EXIF's orientation.
        height: Stored rows.
        decoded_bytes: An upper bound of the memory that decoding takes at its peak, conversion
            to upright RGB included.
        essence: The file with nothing but what decoding needs.
        orientation: EXIF's, 1 to 8; 1 is upright.
        min_bytes: No file that has all these pixels is shorter.
    """

    kind: str
    width: int
    height: int
    decoded_bytes: int
    essence: bytes = field(repr=False)
    orientation: int = 1
    min_bytes: int = 0


def too_many_parts(kind: str) -> ImageTooLargeError:
    """The error for a file of more parts than are walked."""
    return ImageTooLargeError(
        f"the {kind} image has more than {MOST_PARTS} parts; no more are read"
    )
