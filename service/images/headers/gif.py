"""GIF: the first image, and the extension that says which of its colours is transparent."""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, DamagedImageError, ImageHeader, too_many_parts

_EXTENSION, _IMAGE = 0x21, 0x2C
_GRAPHIC_CONTROL = 0xF9


def read(content: bytes) -> ImageHeader:
    """Read a GIF file's header and find its first image."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    head = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control, image = _first_image(content, head)
    left, top, columns, rows = struct.unpack_from("<HHHH", content, image + 1)
    essence = content[:head] + control + content[image:]
    # Decoders enlarge a screen that is smaller than what is shown on it.
    width, height = max(width, left + columns), max(height, top + rows)
    # A palette index, or RGBA where the image lies inside the screen, and RGB.
    return ImageHeader("GIF", width, height, width * height * 9, essence)


def _first_image(content: bytes, place: int) -> tuple[bytes, int]:
    """The graphic control extension of the first image, or nothing, and where the image begins."""
    control, parts = b"", 0
    while parts < MOST_PARTS:
        if content[place] == _IMAGE:
            return control, place
        if content[place] != _EXTENSION:
            raise DamagedImageError("the GIF image is damaged: it holds no image")
        start, kind = place, content[place + 1]
        place += 2
        while content[place]:
            place += 1 + content[place]
            parts += 1
        place += 1
        parts += 1
        if kind == _GRAPHIC_CONTROL:
            control = content[start:place]
    raise too_many_parts("GIF")
