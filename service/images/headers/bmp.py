"""BMP: the header as Pillow reads it, checked against the size of the file."""

from __future__ import annotations

import struct
from typing import Any

from service.images.headers.base import ImageHeader, UnsupportedImageError
from service.images.headers.pillow import open_lazily

_OLD_HEADER = 12
_PLAIN, _BIT_FIELDS = 0, 3


def read(content: bytes) -> ImageHeader:
    """Read a BMP file's header.

    Run-length encoded files are refused: they are rare, and Pillow decodes them in Python, which
    takes 5 s for 20 MB.
    """
    size, compression = struct.unpack_from("<I12xI", content, 14)
    if size != _OLD_HEADER and compression not in (_PLAIN, _BIT_FIELDS):
        raise UnsupportedImageError(f"a BMP image of compression {compression} is not read")
    image = open_lazily(content, "BMP")
    tile: Any = image.tile[0]
    min_bytes = tile.offset + tile.args[1] * image.height  # bytes per row
    # Pixels of at most 4 bytes, and RGB, of 4.
    decoded_bytes = image.width * image.height * 8
    return ImageHeader(
        "BMP", image.width, image.height, decoded_bytes, content, min_bytes=min_bytes
    )
