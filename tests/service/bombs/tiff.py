"""TIFF files: directories, tiles and strips that lie."""

import struct

from honest import encoded
from registry import case


def crowded_directory(number: int, length: int) -> bytes:
    """A TIFF header and a directory whose entries all point at the same bytes."""
    entries = [struct.pack("<HHII", 40_000 + n, 7, length, 8) for n in range(number)]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", number) + b"".join(entries) + b"\0" * 4


def tiff_file(entries: dict[int, tuple[int, int, int]], tail: bytes = b"", big: bool = False):
    form, count = ("<HHQQ", "<Q") if big else ("<HHII", "<H")
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0\x08\0\0\0"
    rows = [struct.pack(form, tag, *value) for tag, value in sorted(entries.items())]
    return head + struct.pack(count, len(rows)) + b"".join(rows) + b"\0" * 8 + tail


def grey_tiff(width: int, height: int, **more: tuple[int, int, int]) -> dict:
    entries = {
        256: (4, 1, width),
        257: (4, 1, height),
        258: (3, 1, 8),
        259: (3, 1, 8),  # deflate, so that no length is expected
        262: (3, 1, 1),
        273: (4, 1, 8),
        277: (3, 1, 1),
        278: (4, 1, height),
        279: (4, 1, 64),
    }
    return entries | {int(tag[1:]): value for tag, value in more.items()}


@case("413-directory-of-65535-entries.tif")
def _() -> bytes:
    return b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 1200


@case("413-directory-of-quintillions.tif")
def _() -> bytes:
    return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**62) + b"\0" * 100


@case("400-directory-behind-the-end.tif")
def _() -> bytes:
    return b"II*\0\xff\xff\xff\x7f" + b"\0" * 100


@case("413-tiles-of-four-gigapixels.tif")
def _() -> bytes:
    tiles = {"t322": (4, 1, 65_536), "t323": (4, 1, 65_536), "t324": (4, 1, 8), "t325": (4, 1, 64)}
    return tiff_file(grey_tiff(16, 16, **tiles), b"\0" * 64)


@case("400-tiles-of-no-width.tif")
def _() -> bytes:
    tiles = {"t323": (4, 1, 65_536), "t324": (4, 1, 8), "t325": (4, 1, 64)}
    return tiff_file(grey_tiff(16, 16, **tiles), b"\0" * 64)


@case("413-billions-of-strips.tif")
def _() -> bytes:
    return tiff_file(grey_tiff(16, 16, t273=(4, 2**30, 8), t279=(4, 2**30, 8)), b"\0" * 64)


@case("413-four-gigapixels.tif")
def _() -> bytes:
    return tiff_file(grey_tiff(65_535, 65_535), b"\0" * 64)


@case("400-uncompressed-and-not-there.tif")
def _() -> bytes:
    return tiff_file(grey_tiff(6000, 6000, t259=(3, 1, 1)), b"\0" * 64)


@case("400-size-that-is-no-number.tif")
def _() -> bytes:
    return tiff_file(grey_tiff(16, 16, t256=(2, 4, 0)), b"\0" * 64)


@case("400-many-samples.tif")
def _() -> bytes:
    return tiff_file(grey_tiff(16, 16, t277=(3, 1, 65_535)), b"\0" * 64)


@case("200-shared-private-entries.tif")
def _() -> bytes:
    tiff = encoded("TIFF")
    (offset,) = struct.unpack_from("<I", tiff, 4)
    (number,) = struct.unpack_from("<H", tiff, offset)
    own = tiff[offset + 2 : offset + 2 + 12 * number]
    more = [struct.pack("<HHII", 40_000 + n, 7, 8000, 8) for n in range(900)]
    at = len(tiff) + len(tiff) % 2
    directory = struct.pack("<H", number + 900) + own + b"".join(more) + b"\0" * 4
    return tiff[:4] + struct.pack("<I", at) + tiff[8:].ljust(at - 8, b"\0") + directory
