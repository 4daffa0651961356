"""WebP: the canvas, and EXIF's orientation."""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, DamagedImageError, ImageHeader, too_many_parts
from service.images.headers.tiff import orientation_of

_HAS_EXIF = 0x08
_FREE_PIXELS = 2**20
_MOST_PIXELS_A_BYTE = 2**14  # a white photograph, compressed as far as it goes, has a thousand


def read(content: bytes) -> ImageHeader:
    """Read a WebP file's header."""
    width, height, orientation = _canvas(content)
    # One colour can fill any size in 40 bytes. Beyond the free ones, pixels must cost something.
    least = max(0, width * height - _FREE_PIXELS) // _MOST_PIXELS_A_BYTE
    # The decoder keeps two canvases of RGBA whether or not there is an animation, and copies the
    # one that it shows; then come the pixels, and their RGB or upright copy.
    return ImageHeader("WebP", width, height, width * height * 20, content, orientation, least)


def _canvas(content: bytes) -> tuple[int, int, int]:
    """Width, height and orientation."""
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
    raise DamagedImageError("the WebP image is damaged: it does not begin with its header")


def _orientation(content: bytes) -> int:
    place = 12
    for _ in range(MOST_PARTS):
        if place + 8 > len(content):
            return 1
        kind, size = struct.unpack_from("<4sI", content, place)
        if kind == b"EXIF":
            return orientation_of(content[place + 8 : place + 8 + size].removeprefix(b"Exif\0\0"))
        place += 8 + size + size % 2
    raise too_many_parts("WebP")
