"""PNG: the chunks that make pixels, and EXIF's orientation."""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, DamagedImageError, ImageHeader, too_many_parts
from service.images.headers.tiff import orientation_of

_SIGNATURE = 8
_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEFLATE_RATIO = 1032  # no deflate stream inflates to more than so many times its size


def read(content: bytes) -> ImageHeader:
    """Read a PNG file's header. Chunks of an animation stay behind, so its first image is left."""
    if content[12:16] != b"IHDR":
        raise DamagedImageError("the PNG image is damaged: it does not begin with its header")
    width, height, depth, colour = struct.unpack_from(">IIBB", content, 16)
    essence, orientation = _essence(content)
    bits = depth * _CHANNELS.get(colour, 1)
    least = width * height * bits // (8 * _DEFLATE_RATIO)
    # Pixels of at most 4 bytes, and their RGB or upright copy, of 4; the rows being composited.
    return ImageHeader("PNG", width, height, width * height * 10, essence, orientation, least)


def _essence(content: bytes) -> tuple[bytes, int]:
    whole = memoryview(content)
    kept = [whole[:_SIGNATURE]]
    place, orientation = _SIGNATURE, 1
    for _ in range(MOST_PARTS):
        if place + 8 > len(content):  # cut short; the decoder says so
            break
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        if kind in _KEPT:
            kept.append(whole[place:end])
        elif kind == b"eXIf":
            orientation = orientation_of(content[place + 8 : end - 4].removeprefix(b"Exif\0\0"))
        place = end
        if kind == b"IEND":
            break
    else:
        raise too_many_parts("PNG")
    return (content if len(kept) == 1 else b"".join(kept)), orientation
