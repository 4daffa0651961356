"""WebP files: canvases, bitstreams and chunks that lie."""

import struct

from honest import encoded
from registry import case


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for kind, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def webp_canvas(width: int, height: int, flags: int = 0) -> tuple[bytes, bytes]:
    sides = [(side - 1).to_bytes(3, "little") for side in (width, height)]
    return b"VP8X", struct.pack("<I", flags) + b"".join(sides)


def webp_pixels() -> tuple[bytes, bytes]:
    webp = encoded("WEBP", lossless=True)
    return webp[12:16], webp[20:]


@case("413-canvas-of-terapixels.webp")
def _() -> bytes:
    return riff(webp_canvas(2**24, 2**24), webp_pixels())


@case("400-canvas-larger-than-its-image.webp")
def _() -> bytes:
    return riff(webp_canvas(6000, 6000), webp_pixels())


@case("400-animation-without-frames.webp")
def _() -> bytes:
    return riff(webp_canvas(6000, 6000, 2), (b"ANIM", b"\0" * 6))


@case("413-lossless-of-268-megapixels.webp")
def _() -> bytes:
    return riff((b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + b"\0" * 20))


@case("400-lossless-of-36-megapixels-and-no-bits.webp")
def _() -> bytes:
    return riff((b"VP8L", b"\x2f" + struct.pack("<I", 5999 | 5999 << 14) + b"\0" * 20))


@case("413-ten-thousand-chunks.webp")
def _() -> bytes:
    return riff(webp_canvas(16, 16, 8), *[(b"junk", b"")] * 10_500)


@case("400-unknown-bitstream.webp")
def _() -> bytes:
    return riff((b"VP9 ", b"\0" * 20))
