"""JPEG: the segments before the first scan, and the number of scans."""

from __future__ import annotations

from collections.abc import Iterator

from service.images.headers.base import (
    MOST_PARTS,
    DamagedImageError,
    ImageHeader,
    ImageTooLargeError,
    too_many_parts,
)
from service.images.headers.tiff import orientation_of

# Encoders write some ten scans. Each costs a walk over every coefficient, however short it is.
MOST_SCANS = 64
MOST_SCANNED = 500_000_000  # scans x pixels

_SCAN, _END = 0xDA, 0xD9
_EXIF = 0xE1
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_HUFFMAN_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}
# JFIF's and Adobe's segments say what the colours mean. The others are left behind.
_BALLAST = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}


def read(content: bytes) -> ImageHeader:
    """Read a JPEG file's header."""
    whole = memoryview(content)
    kept = [whole[:2]]
    frame: tuple[int, bytes] | None = None
    orientation = None
    dropped = False
    for marker, start, end in _segments(content):
        if marker == _SCAN and frame is not None:
            scans = content.count(b"\xff\xda", start)
            essence = b"".join([*kept, whole[start:]]) if dropped else content
            return _header(*frame, scans, essence, orientation or 1)
        if marker in _FRAMES:
            frame = marker, content[start + 4 : end]
        elif marker == _EXIF and orientation is None and content[start + 4 : start + 8] == b"Exif":
            orientation = orientation_of(content[start + 10 : end])
        if marker in _BALLAST:
            dropped = True
        else:
            kept.append(whole[start:end])
    raise DamagedImageError("the JPEG image is damaged: it has no frame before its first scan")


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Each segment's marker, and its range of bytes, marker included."""
    place = 2
    for _ in range(MOST_PARTS):
        start = content.find(b"\xff", place)  # decoders skip what lies between segments
        if start < 0:
            return
        marker = content[start + 1]
        if marker in (0x00, 0xFF):
            place = start + 1
            continue
        if marker == _END:
            return
        length = 0 if marker in _ALONE else content[start + 2] << 8 | content[start + 3]
        if length < 2 and marker not in _ALONE:
            raise DamagedImageError("the JPEG image is damaged: a segment has no length")
        place = start + 2 + length
        yield marker, start, place
    raise too_many_parts("JPEG")


def _header(marker: int, frame: bytes, scans: int, essence: bytes, orientation: int) -> ImageHeader:
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    sampling = [frame[7 + 3 * place] for place in range(frame[5])]
    across = max((one >> 4 for one in sampling), default=0)
    down = max((one & 15 for one in sampling), default=0)
    if not across or not down:
        raise DamagedImageError("the JPEG image is damaged: it has no components")
    pixels = width * height
    # Samples of all components, in units of one component at full size.
    planes = sum((one >> 4) * (one & 15) for one in sampling) / (across * down)
    if scans > MOST_SCANS or (scans > 1 and scans * pixels > MOST_SCANNED):
        raise ImageTooLargeError(
            f"the JPEG image has {scans} scans of {pixels} pixels; at most {MOST_SCANS} scans and"
            f" {MOST_SCANNED} pixels in all of them are read"
        )
    # Pixels of 4 bytes, and beside them coefficients of 2 where scans add to them; later, when
    # those are gone, the upright copy or the RGB.
    coefficients = 2 * planes if scans > 1 or marker == _PROGRESSIVE else 0
    # Huffman's shortest code is a bit, and every block of 8 x 8 has one.
    bits = pixels * planes / 64 if marker in _HUFFMAN_FRAMES else 0
    return ImageHeader(
        "JPEG",
        width,
        height,
        int(pixels * (4 + max(4, coefficients))),
        essence,
        orientation,
        min_bytes=int(bits / 8),
    )
