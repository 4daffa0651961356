"""TIFF, and EXIF, which has TIFF's structure: the first directory.

Pillow reads the values and bounds their bytes by the size of the file. What it does not bound is
counted here: 2.4 million strips, which fit in 20 MB, take it 27 s and 790 MB.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ghm_triton.images.header import (
    ImageError,
    ImageHeader,
    ImageTooLargeError,
    damaged,
    open_lazily,
)

_BITS, _COMPRESSION, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP = 258, 259, 274, 277, 278
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_STRIPS, _TILES = 273, 324
_UNCOMPRESSED = 1
_SHORT = 3
_MOST_ENTRIES = 1000
MOST_STRIPS = 2**16  # or tiles


@dataclass(frozen=True, slots=True)
class _Directory:
    """Position and encoding of a directory: byte order, and TIFF's 32 bits or BigTIFF's 64."""

    start: int
    entry: str
    count: str

    @classmethod
    def first(cls, content: bytes) -> _Directory:
        order = {b"II": "<", b"MM": ">"}.get(content[:2])
        if order is None:
            raise damaged("TIFF", "it has no byte order")
        (version,) = struct.unpack_from(order + "H", content, 2)
        number, position = ("Q", 8) if version == 43 else ("I", 4)
        (start,) = struct.unpack_from(order + number, content, position)
        if start > len(content):
            raise damaged("TIFF", "its directory lies beyond its end")
        count = order + ("Q" if version == 43 else "H")
        return cls(start, f"{order}HH{number}{position}s", count)

    def entries(self, content: bytes) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield each entry's tag, type, number of values, and value or offset."""
        (number,) = struct.unpack_from(self.count, content, self.start)
        if number > _MOST_ENTRIES:
            raise ImageTooLargeError(f"the TIFF image's directory has {number} entries")
        size = struct.calcsize(self.entry)
        begin = self.start + struct.calcsize(self.count)
        for start in range(begin, begin + number * size, size):
            yield struct.unpack_from(self.entry, content, start)


def read(content: bytes) -> ImageHeader:
    """Read a TIFF file's header: the first of its pages."""
    for tag, _, number, _ in _Directory.first(content).entries(content):
        if tag in (_STRIPS, _TILES) and number > MOST_STRIPS:
            raise ImageTooLargeError(
                f"the TIFF image has {number} strips or tiles; at most {MOST_STRIPS} are read"
            )
    image = open_lazily(content, "TIFF")
    width, height, tags = image.width, image.height, getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (1,))[0] * tags.get(_SAMPLES, 1)
    if {_TILE_WIDTH, _TILE_HEIGHT} & set(tags):
        part = tags.get(_TILE_WIDTH, 0) * tags.get(_TILE_HEIGHT, 0)
    else:
        part = width * min(height, tags.get(_ROWS_PER_STRIP, height))
    if part == 0:  # a decoder would guess
        raise damaged("TIFF", "it has strips or tiles of no size")
    if part > 2 * max(width * height, 2**20):
        raise ImageTooLargeError(
            f"the TIFF image of {width} x {height} pixels has tiles of {part} pixels"
        )
    # Pixels of at most 4 bytes and their RGB or upright copy, of 4; one strip or tile as stored.
    decoded_bytes = width * height * 8 + part * math.ceil(bits / 8)
    min_bytes = width * height * bits // 8 if tags.get(_COMPRESSION, 1) == _UNCOMPRESSED else 0
    # Pillow applies the orientation itself, to the size as well.
    return ImageHeader("TIFF", width, height, decoded_bytes, content, min_bytes=min_bytes)


def orientation_of(exif: bytes) -> int:
    """Return the EXIF orientation, 1 to 8.

    Args:
        exif: EXIF data from the byte order on, without the prefix `Exif`.

    Returns:
        The orientation; 1 (upright) where EXIF is broken, as viewers take it.
    """
    try:
        directory = _Directory.first(exif)
        for tag, kind, _, value in directory.entries(exif):
            if tag == _ORIENTATION:
                number = directory.entry[0] + ("H" if kind == _SHORT else "I")
                return int(struct.unpack_from(number, value)[0])
    except (struct.error, ImageError):
        pass
    return 1
