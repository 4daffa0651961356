"""PNG files: chunks that lie, crowd or unpack to more than they are."""

import struct
import zlib

from registry import case


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, *chunks: bytes, data: bytes = b"", colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


@case("413-400-megapixels.png")
def _() -> bytes:
    return png_file(20_000, 20_000, data=zlib.compress(b"\0" * 2**22, 9))


@case("400-40-megapixels-in-100-bytes.png")
def _() -> bytes:
    return png_file(6000, 6000, data=zlib.compress(b"\0" * 100))


@case("413-million-pixels-too-wide.png")
def _() -> bytes:
    return png_file(2**31 - 1, 1)


@case("400-no-pixels.png")
def _() -> bytes:
    return png_file(0, 16)


@case("400-two-headers.png")
def _() -> bytes:
    second = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
    return png_file(4, 4, second, data=zlib.compress(b"\0" * 52))


@case("400-two-headers-the-second-of-which-fits.png")
def _() -> bytes:
    second = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    return png_file(4, 4, second, data=zlib.compress(b"\0" * 14))


@case("200-compressed-texts-of-64-megabytes.png")
def _() -> bytes:
    text = b"k\0\0" + zlib.compress(b"\0" * (2**20 - 64), 9)
    texts = [png_chunk(b"zTXt", text)] * 64
    return png_file(4, 4, *texts, data=zlib.compress(b"\0" * 52))


@case("200-compressed-international-text.png")
def _() -> bytes:
    text = b"k\0\1\0\0\0" + zlib.compress(b"\0" * 2**24, 9)
    return png_file(4, 4, png_chunk(b"iTXt", text), data=zlib.compress(b"\0" * 52))


@case("200-compressed-profile.png")
def _() -> bytes:
    profile = b"k\0\0" + zlib.compress(b"\0" * 2**24, 9)
    return png_file(4, 4, png_chunk(b"iCCP", profile), data=zlib.compress(b"\0" * 52))


@case("413-ten-thousand-chunks.png")
def _() -> bytes:
    return png_file(4, 4, png_chunk(b"teSt", b"") * 10_500, data=zlib.compress(b"\0" * 52))


@case("400-chunk-longer-than-the-file.png")
def _() -> bytes:
    return png_file(4, 4)[:33] + struct.pack(">I", 2**31) + b"IDAT"
