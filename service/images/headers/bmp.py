"""BMP: its one header, and whether the pixels are all there."""

from __future__ import annotations

import struct

from service.images.headers.base import ImageHeader, UnsupportedImageError

_OLD_HEADER = 12
_PLAIN, _BIT_FIELDS = 0, 3


def read(content: bytes) -> ImageHeader:
    """Read a BMP file's header.

    Run-length encoded files, which are hardly found and which Pillow unpacks in Python, are
    refused: four bytes of them can claim gigabytes.
    """
    offset, size = struct.unpack_from("<II", content, 10)
    compression = _PLAIN
    if size == _OLD_HEADER:
        width, height, _, bits = struct.unpack_from("<HHHH", content, 18)
    else:
        width, height, _, bits, compression = struct.unpack_from("<iiHHI", content, 18)
        height = abs(height)  # negative: the rows are stored from the top
    if compression not in (_PLAIN, _BIT_FIELDS):
        raise UnsupportedImageError(f"a BMP image of compression {compression} is not read")
    row = (width * bits + 31) // 32 * 4
    least = offset + row * height
    # Pixels of at most 4 bytes, and RGB, of 4.
    return ImageHeader("BMP", width, height, width * height * 8, content, min_bytes=least)
