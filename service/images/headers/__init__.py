"""Image headers, read before anything is decoded.

Each format has a module whose `read(content)` returns an `ImageHeader`: size, orientation and an
upper bound of the memory that decoding takes. The decoder is given only the parts of the file that
decoding needs. Texts, colour profiles, previews and further frames are dropped, and with them
attacks that hide there, such as a zTXt chunk that inflates to gigabytes or a TIFF directory with a
thousand entries that all refer to the same ten megabytes.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from service.images.headers import bmp, gif, jpeg, png, tiff, webp
from service.images.headers.base import (
    FORMATS,
    DamagedImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
    damaged,
)

_SLACK = 2 * 2**20  # the decoder's tables and row buffers

_READERS = {
    "JPEG": jpeg.read,
    "PNG": png.read,
    "WebP": webp.read,
    "BMP": bmp.read,
    "TIFF": tiff.read,
    "GIF": gif.read,
}

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
}


def measure(content: bytes, max_pixels: int) -> ImageHeader:
    """Read the header of an image file without decoding it.

    Args:
        content: A JPEG, PNG, WebP, BMP, TIFF or GIF file. The format is detected from the bytes.
        max_pixels: Largest number of pixels allowed.

    Returns:
        The header. `decoded_bytes` bounds the memory that `service.images.decode.decode` takes
        beyond the file itself.

    Raises:
        UnsupportedImageError: The format is not supported.
        DamagedImageError: The file is empty, its header is broken, or it has more pixels than
            its bytes can hold.
        ImageTooLargeError: The image has more than `max_pixels` pixels, or more parts or scans
            than any real file.
    """
    if not content:
        raise DamagedImageError("the image is empty: 0 bytes")
    kind = _kind(content)
    try:
        header = _READERS[kind](content)
    except (struct.error, IndexError, TypeError) as error:  # past the end, or of another type
        raise damaged(kind, "its header is cut short or broken") from error
    if min(header.width, header.height) < 1:
        raise damaged(kind, f"it is {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise ImageTooLargeError(
            f"the image is {header.width} x {header.height} pixels; at most {max_pixels} are read"
        )
    if header.min_bytes > len(content):
        raise damaged(
            kind,
            f"{len(content)} bytes are too few for {header.width} x {header.height} pixels",
        )
    copied = 0 if header.essence is content else len(header.essence)
    return replace(header, decoded_bytes=header.decoded_bytes + copied + _SLACK)


def _kind(content: bytes) -> str:
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    raise UnsupportedImageError(f"not an image of a kind read here: {', '.join(FORMATS)}")
