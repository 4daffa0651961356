"""WebP: the canvas, and EXIF orientation."""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, ImageHeader, damaged, too_many_parts
from service.images.headers.tiff import orientation_of

_HAS_EXIF = 0x08
_FREE_PIXELS = 2**20
_PIXELS_PER_BYTE = 2**14  # an all-white photograph at the highest compression has a thousand


def read(content: bytes) -> ImageHeader:
    """Read a WebP file's header."""
    width, height, orientation = _canvas(content)
    # 40 bytes can fill any size with one colour, so files are checked beyond the free pixels only.
    min_bytes = max(0, width * height - _FREE_PIXELS) // _PIXELS_PER_BYTE
    # The decoder keeps two RGBA canvases, with or without an animation, and copies the one shown;
    # then the pixels, and their RGB or upright copy.
    return ImageHeader("WebP", width, height, width * height * 20, content, orientation, min_bytes)


def _canvas(content: bytes) -> tuple[int, int, int]:
    """Return width, height and orientation."""
    kind = content[12:16]
    if kind == b"VP8X":
        flags, columns, rows = struct.unpack("<I3s3s", content[20:30])
        width, height = (1 + int.from_bytes(side, "little") for side in (columns, rows))
        return width, height, _orientation(content) if flags & _HAS_EXIF else 1
    if kind == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    raise damaged("WebP", "it does not begin with its header")


def _orientation(content: bytes) -> int:
    start = 12
    for _ in range(MOST_PARTS):
        if start + 8 > len(content):
            return 1
        kind, size = struct.unpack_from("<4sI", content, start)
        if kind == b"EXIF":
            return orientation_of(content[start + 8 : start + 8 + size].removeprefix(b"Exif\0\0"))
        start += 8 + size + size % 2
    raise too_many_parts("WebP")
