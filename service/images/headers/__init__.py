"""What an image file says of itself, read before anything is decoded.

Each kind has a module of its own whose `read(content)` returns an `ImageHeader`. It walks the file
far enough to know size, orientation and cost, and hands the decoder only what decoding needs:
texts, profiles, previews and further frames stay behind, and with them the traps that are laid in
them (a zTXt chunk that inflates to gigabytes, an IFD whose thousand entries all point at the same
ten megabytes).
"""

from __future__ import annotations

import struct
from dataclasses import replace

from service.images.headers import bmp, gif, jpeg, png, tiff, webp
from service.images.headers.base import (
    FORMATS,
    DamagedImageError,
    ImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
)

__all__ = [
    "FORMATS",
    "DamagedImageError",
    "ImageError",
    "ImageHeader",
    "ImageTooLargeError",
    "UnsupportedImageError",
    "measure",
]

_SLACK = 2 * 2**20  # the decoder's own tables, and the rows it works on

_READERS = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WebP": webp.read,
    "BMP": bmp.read,
    "TIFF": tiff.read,
    "GIF": gif.read,
}

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


def measure(content: bytes, max_pixels: int) -> ImageHeader:
    """Read what an image file says of itself, decoding nothing.

    Args:
        content: The bytes of a JPEG, PNG, WebP, BMP, TIFF or GIF file. The kind is read from
            them, not from what a client calls them.
        max_pixels: The most pixels allowed.

    Returns:
        The header. Its `decoded_bytes` bound the memory that `service.images.decode.decode`
        takes for it, beyond the file itself.

    Raises:
        UnsupportedImageError: The bytes are no image of these kinds.
        DamagedImageError: There are no bytes, or the header is broken, or promises more pixels
            than so few bytes can hold.
        ImageTooLargeError: The image has more pixels than allowed, or more parts or scans than
            any honest file.
    """
    if not content:
        raise DamagedImageError("the image is empty: 0 bytes")
    kind = _kind(content)
    try:
        header = _READERS[kind](content)
    except (struct.error, IndexError) as error:  # reading past the end
        raise DamagedImageError(f"the {kind} image is damaged: its header is cut short") from error
    if min(header.width, header.height) < 1:
        raise DamagedImageError(
            f"the {kind} image is damaged: it is {header.width} x {header.height} pixels"
        )
    if header.width * header.height > max_pixels:
        raise ImageTooLargeError(
            f"the image is {header.width} x {header.height} pixels; at most {max_pixels} are read"
        )
    if header.min_bytes > len(content):
        raise DamagedImageError(
            f"the {kind} image is damaged: {len(content)} bytes are too few for"
            f" {header.width} x {header.height} pixels"
        )
    copied = 0 if header.essence is content else len(header.essence)
    return replace(header, decoded_bytes=header.decoded_bytes + copied + _SLACK)


def _kind(content: bytes) -> str:
    for signature, kind in _SIGNATURES:
        if content.startswith(signature):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    raise UnsupportedImageError(f"not an image of a kind read here: {', '.join(FORMATS)}")
