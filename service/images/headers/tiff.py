"""TIFF, and EXIF, which is a TIFF file without pixels: the first directory."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from service.images.headers.base import DamagedImageError, ImageHeader, ImageTooLargeError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _ORIENTATION = 256, 257, 258, 259, 274
_STRIPS, _SAMPLES, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT, _TILES = 273, 277, 278, 322, 323, 324
# What decoding needs. Everything else, further directories included, is left behind.
_KEPT = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, 262, 266, _STRIPS, _SAMPLES, _ROWS_PER_STRIP, 279),
    *(284, 292, 293, 317, 320, _TILE_WIDTH, _TILE_HEIGHT, _TILES, 325, 338, 339, 347),
    *(512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532),
}
_TILED = {_TILE_WIDTH, _TILE_HEIGHT, _TILES, 325}
_UNCOMPRESSED = 1
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_MOST_ENTRIES = 1000
MOST_VALUES = 2**17  # of all entries together; offsets of strips or tiles are the most of them


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a file writes its numbers: byte order, and TIFF's 32 bits or BigTIFF's 64."""

    order: str
    big: bool
    directory: int

    @property
    def entry(self) -> str:
        return self.order + ("HHQ8s" if self.big else "HHI4s")

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.big else "H")

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of a directory.

    Attributes:
        tag: What it says.
        raw: Its bytes.
        kind: The type of its values.
        number: How many there are.
        first: The bytes of the first value, as far as the file has them.
    """

    tag: int
    raw: bytes
    kind: int
    number: int
    first: bytes


def read(content: bytes) -> ImageHeader:
    """Read a TIFF file's header: the first of its pages."""
    layout = _layout(content)
    found: dict[int, _Entry] = {}
    for entry in _entries(content, layout):
        found.setdefault(entry.tag, entry)
    width, height = (_number(found, layout, tag, 0) for tag in (_WIDTH, _HEIGHT))
    samples = _number(found, layout, _SAMPLES, 1)
    bits = _number(found, layout, _BITS, 1) * samples
    plain = _number(found, layout, _COMPRESSION, 1) == _UNCOMPRESSED
    part = _part(found, layout, width, height)
    if part > 2 * max(width * height, 2**20):
        raise ImageTooLargeError(
            f"the TIFF image of {width} x {height} pixels has tiles of {part} pixels"
        )
    # Pixels of at most 4 bytes and their RGB or upright copy, of 4; one strip or tile as stored.
    memory = width * height * 8 + part * math.ceil(bits / 8)
    return ImageHeader(
        "TIFF",
        width,
        height,
        memory,
        _essence(content, layout, [entry for entry in found.values() if entry.tag in _KEPT]),
        _number(found, layout, _ORIENTATION, 1),
        min_bytes=width * height * bits // 8 if plain else 0,
    )


def orientation_of(exif: bytes) -> int:
    """EXIF's orientation, 1 to 8.

    Args:
        exif: From the byte order on, without `Exif` before it.

    Returns:
        1, upright, also where EXIF is broken: good pixels beside it are shown by viewers so.
    """
    try:
        layout = _layout(exif)
        for entry in _entries(exif, layout):
            if entry.tag == _ORIENTATION:
                return _number({_ORIENTATION: entry}, layout, _ORIENTATION, 1)
    except (struct.error, DamagedImageError, ImageTooLargeError):
        pass
    return 1


def _layout(content: bytes) -> _Layout:
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None:
        raise DamagedImageError("the TIFF image is damaged: it has no byte order")
    (version,) = struct.unpack_from(order + "H", content, 2)
    if version == 43:
        return _Layout(order, True, struct.unpack_from(order + "Q", content, 8)[0])
    return _Layout(order, False, struct.unpack_from(order + "I", content, 4)[0])


def _entries(content: bytes, layout: _Layout) -> Iterator[_Entry]:
    place = layout.directory
    if place > len(content):
        raise DamagedImageError("the TIFF image is damaged: its directory lies beyond its end")
    (number,) = struct.unpack_from(layout.count, content, place)
    if number > _MOST_ENTRIES:
        raise ImageTooLargeError(f"the TIFF image's directory has {number} entries")
    place += struct.calcsize(layout.count)
    size = struct.calcsize(layout.entry)
    for start in range(place, place + number * size, size):
        tag, kind, count, value = struct.unpack_from(layout.entry, content, start)
        width = _SIZES.get(kind, 0)
        if width * count > len(value):
            (offset,) = struct.unpack(layout.offset, value)
            value = content[offset : offset + width]
        yield _Entry(tag, content[start : start + size], kind, count, value)


def _number(found: dict[int, _Entry], layout: _Layout, tag: int, default: int) -> int:
    """The first value of a tag."""
    entry = found.get(tag)
    if entry is None or not entry.number:
        return default
    letter = _NUMBERS.get(entry.kind)
    if letter is None:
        raise DamagedImageError(f"the TIFF image is damaged: its tag {tag} is no number")
    return int(struct.unpack_from(layout.order + letter, entry.first)[0])


def _part(found: dict[int, _Entry], layout: _Layout, width: int, height: int) -> int:
    """Pixels of one tile or strip, which is decoded at once."""
    if not _TILED & found.keys():
        return width * min(height, _number(found, layout, _ROWS_PER_STRIP, height))
    sides = [_number(found, layout, tag, 0) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
    if 0 in sides:  # a decoder would make something up
        raise DamagedImageError("the TIFF image is damaged: it has tiles of no size")
    return sides[0] * sides[1]


def _essence(content: bytes, layout: _Layout, kept: list[_Entry]) -> bytes:
    """The file with these entries alone in its directory, after which no other comes."""
    values = sum(entry.number for entry in kept)
    if values > MOST_VALUES:
        raise ImageTooLargeError(
            f"the TIFF image's directory has {values} values; at most {MOST_VALUES} are read"
        )
    directory = b"".join(
        [
            struct.pack(layout.count, len(kept)),
            *(entry.raw for entry in kept),
            struct.pack(layout.offset, 0),
        ]
    )
    whole, start = memoryview(content), layout.directory
    return b"".join([whole[:start], directory, whole[start + len(directory) :]])
