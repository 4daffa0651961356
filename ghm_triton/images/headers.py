"""Image headers, read before anything is decoded.

Each format has a reader that returns an `ImageHeader`: size, orientation and an upper bound of the
memory that decoding takes. The decoder is given only the parts of a JPEG, PNG or GIF file that it
needs. Texts, colour profiles, previews and further frames are dropped, and with them attacks that
hide there, such as a zTXt chunk that inflates to gigabytes.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from ghm_triton.images import jpeg, tiff
from ghm_triton.images.header import (
    FORMATS,
    MOST_PARTS,
    MOST_PIXELS,
    MOST_SIDE,
    DamagedImageError,
    ImageHeader,
    ImageTooLargeError,
    UnsupportedImageError,
    damaged,
    open_lazily,
    too_many_parts,
)
from ghm_triton.images.tiff import orientation_of

_SLACK = 2 * 2**20  # the decoder's tables and row buffers

_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"BM": "BMP",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\x00": "TIFF",
    b"MM\x00*": "TIFF",
    b"II+\x00": "TIFF",
    b"MM\x00+": "TIFF",
}


def measure(content: bytes, max_pixels: int = MOST_PIXELS) -> ImageHeader:
    """Read the header of an image file without decoding it.

    Args:
        content: A JPEG, PNG, WebP, BMP, TIFF or GIF file. The format is detected from the bytes.
        max_pixels: Largest number of pixels allowed.

    Returns:
        The header. `decoded_bytes` bounds the memory that `ghm_triton.images.decode.decode` takes
        beyond the file itself.

    Raises:
        UnsupportedImageError: The format is not supported.
        DamagedImageError: The file is empty, its header is broken, or it has more pixels than
            its bytes can hold.
        ImageTooLargeError: The image has more than `max_pixels` pixels, or more parts or scans
            than any real file.
    """
    if not content:
        raise DamagedImageError("the image is empty: 0 bytes")
    kind = kind_of(content)
    try:
        header = _READERS[kind](content)
    except (struct.error, IndexError, TypeError) as error:  # past the end, or of another type
        raise damaged(kind, "its header is cut short or broken") from error
    if min(header.width, header.height) < 1:
        raise damaged(kind, f"it is {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise ImageTooLargeError(
            f"the image is {header.width} x {header.height} pixels; at most {max_pixels} are read"
        )
    if max(header.width, header.height) > MOST_SIDE:
        raise ImageTooLargeError(
            f"the image is {header.width} x {header.height} pixels; at most {MOST_SIDE} of a side"
            " are read"
        )
    if header.min_bytes > len(content):
        raise damaged(
            kind,
            f"{len(content)} bytes are too few for {header.width} x {header.height} pixels",
        )
    copied = 0 if header.essence is content else len(header.essence)
    return replace(header, decoded_bytes=header.decoded_bytes + copied + _SLACK)


def kind_of(content: bytes) -> str:
    """Return the format of an image file, one of `FORMATS`, by its first 16 bytes.

    Raises:
        UnsupportedImageError: The format is not supported.
    """
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WebP"
    raise UnsupportedImageError(f"not an image of a kind read here: {', '.join(FORMATS)}")


_PNG_SIGNATURE = 8
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEFLATE_RATIO = 1032  # the largest that deflate reaches


def _read_png(content: bytes) -> ImageHeader:
    """Read a PNG file's header. Animation chunks are dropped, which leaves the first image."""
    if content[12:16] != b"IHDR":
        raise damaged("PNG", "it does not begin with its header")
    width, height, depth, colour = struct.unpack_from(">IIBB", content, 16)
    essence, orientation = _png_essence(content)
    bits = depth * _PNG_CHANNELS.get(colour, 1)
    min_bytes = width * height * bits // (8 * _DEFLATE_RATIO)
    # Pixels of at most 4 bytes, their RGB or upright copy, of 4, and the rows being composited.
    return ImageHeader("PNG", width, height, width * height * 10, essence, orientation, min_bytes)


def _png_essence(content: bytes) -> tuple[bytes, int]:
    """Return the file without other chunks than those kept, and the orientation."""
    whole = memoryview(content)
    kept = [whole[:_PNG_SIGNATURE]]
    start, orientation = _PNG_SIGNATURE, 1
    for _ in range(MOST_PARTS):
        if start + 8 > len(content):  # cut short; the decoder reports it
            break
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + 12 + length
        if kind in _PNG_KEPT:
            kept.append(whole[start:end])
        elif kind == b"eXIf":
            orientation = orientation_of(content[start + 8 : end - 4].removeprefix(b"Exif\0\0"))
        start = end
        if kind == b"IEND":
            break
    else:
        raise too_many_parts("PNG")
    return b"".join(kept), orientation


_WEBP_EXIF = 0x08
_WEBP_FREE_PIXELS = 2**20
_WEBP_PIXELS_PER_BYTE = 2**14  # an all-white photograph at the highest compression has a thousand


def _read_webp(content: bytes) -> ImageHeader:
    """Read a WebP file's header."""
    width, height, orientation = _webp_canvas(content)
    # 40 bytes can fill any size with one colour, so files are checked beyond the free pixels only.
    min_bytes = max(0, width * height - _WEBP_FREE_PIXELS) // _WEBP_PIXELS_PER_BYTE
    # The decoder keeps two RGBA canvases, with or without an animation, and copies the one shown;
    # then the pixels, and their RGB or upright copy.
    return ImageHeader("WebP", width, height, width * height * 20, content, orientation, min_bytes)


def _webp_canvas(content: bytes) -> tuple[int, int, int]:
    """Return width, height and orientation."""
    kind = content[12:16]
    if kind == b"VP8X":
        flags, columns, rows = struct.unpack("<I3s3s", content[20:30])
        width, height = (1 + int.from_bytes(side, "little") for side in (columns, rows))
        return width, height, _webp_orientation(content) if flags & _WEBP_EXIF else 1
    if kind == b"VP8L" and content[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", content, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1
    if kind == b"VP8 " and content[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF, 1
    raise damaged("WebP", "it does not begin with its header")


def _webp_orientation(content: bytes) -> int:
    start = 12
    for _ in range(MOST_PARTS):
        if start + 8 > len(content):
            return 1
        kind, size = struct.unpack_from("<4sI", content, start)
        if kind == b"EXIF":
            return orientation_of(content[start + 8 : start + 8 + size].removeprefix(b"Exif\0\0"))
        start += 8 + size + size % 2
    raise too_many_parts("WebP")


_GIF_EXTENSION, _GIF_IMAGE = 0x21, 0x2C
_GIF_CONTROL = 0xF9


def _read_gif(content: bytes) -> ImageHeader:
    """Read a GIF file's header and find its first image.

    Not by Pillow: it collects comments in blocks of 1 to 255 bytes, and a 20 MB file of 1-byte
    blocks takes it 3 s and 840 MB before any limit on pixels applies.
    """
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    head = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    control, image = _first_gif_image(content, head)
    left, top, columns, rows = struct.unpack_from("<HHHH", content, image + 1)
    essence = content[:head] + control + content[image:]
    # Decoders enlarge a screen that is smaller than the images on it.
    width, height = max(width, left + columns), max(height, top + rows)
    # A palette index, or RGBA where the image does not fill the screen, and RGB.
    return ImageHeader("GIF", width, height, width * height * 9, essence)


def _first_gif_image(content: bytes, position: int) -> tuple[bytes, int]:
    """Return the first image's graphic control extension, if any, and the image's position."""
    control, parts = b"", 0
    while parts < MOST_PARTS:
        if content[position] == _GIF_IMAGE:
            return control, position
        if content[position] != _GIF_EXTENSION:
            raise damaged("GIF", "it holds no image")
        start, kind = position, content[position + 1]
        position, parts = position + 2, parts + 1
        while content[position] and parts < MOST_PARTS:
            position, parts = position + 1 + content[position], parts + 1
        position += 1
        if kind == _GIF_CONTROL:
            control = content[start:position]
    raise too_many_parts("GIF")


_BMP_OLD_HEADER = 12
_BMP_PLAIN, _BMP_BIT_FIELDS = 0, 3


def _read_bmp(content: bytes) -> ImageHeader:
    """Read a BMP file's header.

    Run-length encoded files are refused: they are rare, and Pillow decodes them in Python, which
    takes 5 s for 20 MB.
    """
    size, compression = struct.unpack_from("<I12xI", content, 14)
    if size != _BMP_OLD_HEADER and compression not in (_BMP_PLAIN, _BMP_BIT_FIELDS):
        raise UnsupportedImageError(f"a BMP image of compression {compression} is not read")
    image = open_lazily(content, "BMP")
    tile: Any = image.tile[0]
    min_bytes = tile.offset + tile.args[1] * image.height  # bytes per row
    # Pixels of at most 4 bytes, and RGB, of 4.
    decoded_bytes = image.width * image.height * 8
    return ImageHeader(
        "BMP", image.width, image.height, decoded_bytes, content, min_bytes=min_bytes
    )


_READERS = {
    "JPEG": jpeg.read,
    "PNG": _read_png,
    "WebP": _read_webp,
    "BMP": _read_bmp,
    "TIFF": tiff.read,
    "GIF": _read_gif,
}
