"""GIF: the first image, and the extension that names its transparent colour.

Pillow also reads the header lazily, but collects comments in blocks of 1 to 255 bytes: a 20 MB
file of 1-byte blocks takes it 3 s and 840 MB before any limit on pixels applies.
"""

from __future__ import annotations

import struct

from service.images.headers.base import MOST_PARTS, ImageHeader, damaged, too_many_parts

_EXTENSION, _IMAGE = 0x21, 0x2C
_GRAPHIC_CONTROL = 0xF9


def read(content: bytes) -> ImageHeader:
    """Read a GIF file's header and find its first image."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    head = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control, image = _first_image(content, head)
    left, top, columns, rows = struct.unpack_from("<HHHH", content, image + 1)
    essence = content[:head] + control + content[image:]
    # Decoders enlarge a screen that is smaller than the images on it.
    width, height = max(width, left + columns), max(height, top + rows)
    # A palette index, or RGBA where the image does not fill the screen, and RGB.
    return ImageHeader("GIF", width, height, width * height * 9, essence)


def _first_image(content: bytes, position: int) -> tuple[bytes, int]:
    """Return the first image's graphic control extension, if any, and the image's position."""
    control, parts = b"", 0
    while parts < MOST_PARTS:
        if content[position] == _IMAGE:
            return control, position
        if content[position] != _EXTENSION:
            raise damaged("GIF", "it holds no image")
        start, kind = position, content[position + 1]
        position, parts = position + 2, parts + 1
        while content[position] and parts < MOST_PARTS:
            position, parts = position + 1 + content[position], parts + 1
        position += 1
        if kind == _GRAPHIC_CONTROL:
            control = content[start:position]
    raise too_many_parts("GIF")
