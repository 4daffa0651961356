"""BMP files: sizes and compressions that lie."""

import struct

from registry import case


def bmp_file(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    offset = 54 + (1024 if bits <= 8 else 0)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    head = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return (head + info).ljust(offset, b"\0") + data


@case("415-run-lengths-of-gigabytes.bmp")
def _() -> bytes:
    return bmp_file(30_000_000, 1, 8, 1, b"\0\2\xff\xff" * 8)


@case("400-36-megapixels-and-no-bytes.bmp")
def _() -> bytes:
    return bmp_file(6000, 6000, 24, 0, b"")


@case("413-billions-of-rows.bmp")
def _() -> bytes:
    return bmp_file(2, -(2**31), 24, 0, b"")


@case("413-negative-width.bmp")
def _() -> bytes:
    return bmp_file(-5, 5, 24, 0, b"\0" * 100)


@case("415-png-inside.bmp")
def _() -> bytes:
    return bmp_file(4, 4, 24, 5, b"\x89PNG")
