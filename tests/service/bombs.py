"""Image files and bodies that lie or break, each with the status that it is answered with.

Run to write them into `corpus/`, one file each, named by status; the tests read them from there:

    python tests/service/bombs.py
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

CORPUS = Path(__file__).with_name("corpus")

Builder = Callable[[], bytes]
BUILDERS: dict[str, Builder] = {}


def case(name: str) -> Callable[[Builder], Builder]:
    """Register a file. Its name begins with its status and ends with its type."""

    def register(build: Builder) -> Builder:
        BUILDERS[name] = build
        return build

    return register


# Small and honest files, of every kind and variant; lying ones are made of them.


def encoded(kind: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def mode(name: str, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    grey = Image.linear_gradient("L").resize((16, 16))
    grey.convert("RGB").convert(name).save(buffer, kind, **options)
    return buffer.getvalue()


def animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BUILDERS |= {
    "200-honest.jpg": lambda: encoded("JPEG"),
    "200-progressive.jpg": lambda: encoded("JPEG", progressive=True, exif=exif(6)),
    "200-cmyk.jpg": lambda: mode("CMYK", "JPEG"),
    "200-grey.jpg": lambda: mode("L", "JPEG"),
    "200-honest.png": lambda: encoded("PNG", exif=exif(3)),
    "200-alpha.png": lambda: mode("RGBA", "PNG"),
    "200-grey-alpha.png": lambda: mode("LA", "PNG"),
    "200-palette.png": lambda: mode("P", "PNG", transparency=3),
    "200-bilevel.png": lambda: mode("1", "PNG"),
    "200-sixteen-bits.png": lambda: mode("I;16", "PNG"),
    "200-animation.png": lambda: animation("PNG"),
    "200-honest.gif": lambda: mode("P", "GIF", transparency=3),
    "200-animation.gif": lambda: animation("GIF"),
    "200-lossy.webp": lambda: encoded("WEBP", exif=exif(8)),
    "200-lossless.webp": lambda: mode("RGBA", "WEBP", lossless=True),
    "200-animation.webp": lambda: animation("WEBP"),
    "200-honest.bmp": lambda: encoded("BMP"),
    "200-palette.bmp": lambda: mode("P", "BMP"),
    "200-plain.tif": lambda: encoded("TIFF", exif=exif(5)),
    "200-lzw.tif": lambda: encoded("TIFF", compression="tiff_lzw"),
    "200-deflate.tif": lambda: encoded("TIFF", compression="tiff_adobe_deflate"),
    "200-jpeg.tif": lambda: encoded("TIFF", compression="jpeg"),
    "200-fax.tif": lambda: mode("1", "TIFF", compression="group4"),
    "200-packbits.tif": lambda: mode("CMYK", "TIFF", compression="packbits"),
    "200-sixteen-bits.tif": lambda: mode("I;16", "TIFF"),
    "200-big.tif": lambda: encoded("TIFF", big_tiff=True),
    "415-floats.tif": lambda: mode("F", "TIFF"),
}

# PNG files: chunks that lie, crowd or unpack to more than they are.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(width: int, height: int, *chunks: bytes, data: bytes = b"", colour: int = 2) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


BUILDERS |= {
    "413-400-megapixels.png": lambda: png_file(
        20_000, 20_000, data=zlib.compress(b"\0" * 2**22, 9)
    ),
    "400-40-megapixels-in-100-bytes.png": lambda: png_file(
        6000, 6000, data=zlib.compress(b"\0" * 100)
    ),
    "413-million-pixels-too-wide.png": lambda: png_file(2**31 - 1, 1),
    "400-no-pixels.png": lambda: png_file(0, 16),
    "413-ten-thousand-chunks.png": lambda: png_file(
        4, 4, png_chunk(b"teSt", b"") * 10_500, data=zlib.compress(b"\0" * 52)
    ),
    "400-chunk-longer-than-the-file.png": lambda: (
        png_file(4, 4)[:33] + struct.pack(">I", 2**31) + b"IDAT"
    ),
}


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


# TIFF files: directories, tiles and strips that lie.


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


BUILDERS |= {
    "413-directory-of-65535-entries.tif": lambda: b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 1200,
    "413-directory-of-quintillions.tif": lambda: (
        b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**62) + b"\0" * 100
    ),
    "400-directory-behind-the-end.tif": lambda: b"II*\0\xff\xff\xff\x7f" + b"\0" * 100,
    "413-billions-of-strips.tif": lambda: tiff_file(
        grey_tiff(16, 16, t273=(4, 2**30, 8), t279=(4, 2**30, 8)), b"\0" * 64
    ),
    "413-four-gigapixels.tif": lambda: tiff_file(grey_tiff(65_535, 65_535), b"\0" * 64),
    "400-uncompressed-and-not-there.tif": lambda: tiff_file(
        grey_tiff(6000, 6000, t259=(3, 1, 1)), b"\0" * 64
    ),
    "400-size-that-is-no-number.tif": lambda: tiff_file(
        grey_tiff(16, 16, t256=(2, 4, 0)), b"\0" * 64
    ),
    "400-many-samples.tif": lambda: tiff_file(grey_tiff(16, 16, t277=(3, 1, 65_535)), b"\0" * 64),
}


@case("413-tiles-of-four-gigapixels.tif")
def _() -> bytes:
    tiles = {"t322": (4, 1, 65_536), "t323": (4, 1, 65_536), "t324": (4, 1, 8), "t325": (4, 1, 64)}
    return tiff_file(grey_tiff(16, 16, **tiles), b"\0" * 64)


@case("400-tiles-of-no-width.tif")
def _() -> bytes:
    tiles = {"t323": (4, 1, 65_536), "t324": (4, 1, 8), "t325": (4, 1, 64)}
    return tiff_file(grey_tiff(16, 16, **tiles), b"\0" * 64)


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


# JPEG files: sizes that lie, and too many scans, comments or entries.


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + segment + jpeg[2:]


def jpeg_claiming(width: int, height: int, jpeg: bytes) -> bytes:
    marker = b"\xff\xc2" if b"\xff\xc2" in jpeg else b"\xff\xc0"
    place = jpeg.index(marker) + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


BUILDERS |= {
    "413-four-gigapixels.jpg": lambda: jpeg_claiming(65_535, 65_535, encoded("JPEG")),
    "400-36-megapixels-in-a-kilobyte.jpg": lambda: jpeg_claiming(
        6000, 6000, encoded("JPEG", progressive=True)
    ),
    "400-no-rows.jpg": lambda: jpeg_claiming(16, 0, encoded("JPEG")),
    "400-segment-without-length.jpg": lambda: with_segment(encoded("JPEG"), b"\xff\xe1\x00\x00"),
    "413-ten-thousand-comments.jpg": lambda: with_segment(
        encoded("JPEG"), jpeg_segment(0xFE, b"") * 10_500
    ),
    "200-preview-index-of-nothing.jpg": lambda: with_segment(
        encoded("JPEG"), jpeg_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")
    ),
    "200-motion-photo.jpg": lambda: (
        encoded("JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 200
    ),  # a video behind its end,
}


@case("413-ten-thousand-scans.jpg")
def _() -> bytes:
    jpeg = encoded("JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # spectral selection of one component
    return jpeg[:-2] + scan * 10_000 + b"\xff\xd9"


@case("413-fifty-scans-of-thirty-six-megapixels.jpg")
def _() -> bytes:
    jpeg = jpeg_claiming(6000, 6000, encoded("JPEG", progressive=True))
    return jpeg[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 40 + b"\xff\xd9"


@case("400-no-scan.jpg")
def _() -> bytes:
    jpeg = encoded("JPEG")
    return jpeg[: jpeg.index(b"\xff\xda")]


@case("200-exif-whose-entries-share-60-kilobytes.jpg")
def _() -> bytes:
    exif = crowded_directory(4000, 8000)
    return with_segment(encoded("JPEG"), jpeg_segment(0xE1, b"Exif\0\0" + exif))


# GIF files: screens, frames and extensions that lie or never end.


BUILDERS |= {
    "400-no-image.gif": lambda: encoded("GIF")[:13] + b";",
    "400-extensions-without-end.gif": lambda: encoded("GIF")[:13] + b"!\xfe\xff" * 20,
}


@case("413-screen-of-four-gigapixels.gif")
def _() -> bytes:
    gif = encoded("GIF")
    return gif[:6] + b"\xff\xff\xff\xff" + gif[10:]


@case("413-frame-beyond-its-screen.gif")
def _() -> bytes:
    gif = encoded("GIF")
    place = gif.index(b",\0\0\0\0")
    return gif[: place + 1] + b"\xf0\xff" * 4 + gif[place + 9 :]


@case("413-comment-in-ten-thousand-pieces.gif")
def _() -> bytes:
    gif = encoded("GIF")
    head = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:head] + b"!\xfe" + b"\x01x" * 10_500 + b"\0" + gif[head:]


# WebP files: canvases, bitstreams and chunks that lie.


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


BUILDERS |= {
    "413-canvas-of-terapixels.webp": lambda: riff(webp_canvas(2**24, 2**24), webp_pixels()),
    "400-canvas-larger-than-its-image.webp": lambda: riff(webp_canvas(6000, 6000), webp_pixels()),
    "400-animation-without-frames.webp": lambda: riff(
        webp_canvas(6000, 6000, 2), (b"ANIM", b"\0" * 6)
    ),
    "413-lossless-of-268-megapixels.webp": lambda: riff(
        (b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF) + b"\0" * 20)
    ),
    "400-lossless-of-36-megapixels-and-no-bits.webp": lambda: riff(
        (b"VP8L", b"\x2f" + struct.pack("<I", 5999 | 5999 << 14) + b"\0" * 20)
    ),
    "413-ten-thousand-chunks.webp": lambda: riff(
        webp_canvas(16, 16, 8), *[(b"junk", b"")] * 10_500
    ),
    "400-unknown-bitstream.webp": lambda: riff((b"VP9 ", b"\0" * 20)),
}

# BMP files: sizes and compressions that lie.


def bmp_file(width: int, height: int, bits: int, compression: int, data: bytes) -> bytes:
    offset = 54 + (1024 if bits <= 8 else 0)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, 0, 0)
    head = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return (head + info).ljust(offset, b"\0") + data


BUILDERS |= {
    "415-run-lengths-of-gigabytes.bmp": lambda: bmp_file(30_000_000, 1, 8, 1, b"\0\2\xff\xff" * 8),
    "400-36-megapixels-and-no-bytes.bmp": lambda: bmp_file(6000, 6000, 24, 0, b""),
    "413-billions-of-rows.bmp": lambda: bmp_file(2, -(2**31), 24, 0, b""),
    "413-negative-width.bmp": lambda: bmp_file(-5, 5, 24, 0, b"\0" * 100),
    "415-png-inside.bmp": lambda: bmp_file(4, 4, 24, 5, b"\x89PNG"),
}

# Bodies of requests: a form after its Content-Type, and JSON.


TWO_FILES = (
    b"multipart/form-data; boundary=b\n"
    b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n'
    b"Content-Type: image/png\r\n\r\n\x89PNG\r\n--b\r\n"
    b"Content-Disposition: form-data; name=\"files\"; filename*=UTF-8''%e2%82%ac.png\r\n\r\nx\r\n"
    b'--b\r\nContent-Disposition: form-data; name="iou"\r\n\r\n0.5\r\n--b--\r\n'
)
BUILDERS |= {
    "form-200-two-files": lambda: TWO_FILES,
    "form-400-cut-short": lambda: TWO_FILES[:-9],
    "form-400-no-boundary": lambda: b"multipart/form-data" + TWO_FILES[31:],
    "form-400-boundary-too-long": lambda: TWO_FILES.replace(b"=b\n", b"=" + b"b" * 300 + b"\n"),
    "form-400-header-of-100-kilobytes": lambda: TWO_FILES.replace(b"image/png", b"x" * 100_000),
    "form-400-part-without-a-name": lambda: TWO_FILES.replace(b"; name=", b"; nome="),
    "form-400-many-files": lambda: b"x; boundary=b\n" + TWO_FILES[31:][:80] * 6,
    "form-422-unknown-option": lambda: TWO_FILES.replace(b'"iou"', b'"uoi"'),
    "json-200-two-images": lambda: b'{"images": ["eA==", "eA=="], "thresholds": {"dog": 0.5}}',
    "json-200-options": lambda: (
        b'{"image": "eA==", "iou": 0.5, "classes": ["a"], "max_detections": 3, "threshold": 0.1,'
        b' "format": "coco", "image_ids": [1], "model": "m", "version": null}'
    ),
    "json-400-nesting": lambda: b"[" * 100_000,
    "json-400-no-image": lambda: b'{"threshold": 0.5}',
    "json-400-no-base64": lambda: b'{"image": "e"}',
    "json-400-infinity": lambda: b'{"image": "eA==", "threshold": 1e999}',
    "json-422-true": lambda: b'{"image": "eA==", "threshold": true}',
}

# Files of kinds that are not read.


BUILDERS |= {
    "415-icon.ico": lambda: encoded("ICO"),
    "415-picture.avif": lambda: encoded("AVIF"),
    "415-picture.jp2": lambda: encoded("JPEG2000"),
    "415-document.pdf": lambda: b"%PDF-1.7\n",
}


if __name__ == "__main__":
    CORPUS.mkdir(exist_ok=True)
    for name, build in BUILDERS.items():
        (CORPUS / name).write_bytes(build())
