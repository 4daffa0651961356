"""PNG: the chunks that hold pixels, and EXIF orientation."""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, ImageHeader, damaged, too_many_parts
from service.images.headers.tiff import orientation_of

_SIGNATURE = 8
_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEFLATE_RATIO = 1032  # the largest that deflate reaches


def read(content: bytes) -> ImageHeader:
    """Read a PNG file's header. Animation chunks are dropped, which leaves the first image."""
    if content[12:16] != b"IHDR":
        raise damaged("PNG", "it does not begin with its header")
    width, height, depth, colour = struct.unpack_from(">IIBB", content, 16)
    essence, orientation = _essence(content)
    bits = depth * _CHANNELS.get(colour, 1)
    min_bytes = width * height * bits // (8 * _DEFLATE_RATIO)
    # Pixels of at most 4 bytes, their RGB or upright copy, of 4, and the rows being composited.
    return ImageHeader("PNG", width, height, width * height * 10, essence, orientation, min_bytes)


def _essence(content: bytes) -> tuple[bytes, int]:
    """Return the file without other chunks than those kept, and the orientation."""
    whole = memoryview(content)
    kept = [whole[:_SIGNATURE]]
    start, orientation = _SIGNATURE, 1
    for _ in range(MOST_PARTS):
        if start + 8 > len(content):  # cut short; the decoder reports it
            break
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if kind in _KEPT:
            kept.append(whole[start:end])
        elif kind == b"eXIf":
            orientation = orientation_of(content[start + 8 : end - 4].removeprefix(b"Exif\0\0"))
        start = end
        if kind == b"IEND":
            break
    else:
        raise too_many_parts("PNG")
    return b"".join(kept), orientation
