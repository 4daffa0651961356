"""JPEG: the segments before the first scan, and the number of scans."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ghm_triton.images.header import (
    MOST_PARTS,
    ImageHeader,
    ImageTooLargeError,
    damaged,
    too_many_parts,
)
from ghm_triton.images.tiff import orientation_of

# Encoders write about ten scans. Each costs a pass over every coefficient, however short it is.
MOST_SCANS = 64
MOST_SCANNED = 500_000_000  # scans x pixels

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # neither a stuffed byte nor a restart
_SCAN, _END = 0xDA, 0xD9
_EXIF = 0xE1
_WITHOUT_LENGTH = {0x01, 0xD8}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = 0xC2
_HUFFMAN_FRAMES = {0xC0, 0xC1, _PROGRESSIVE}
# The JFIF and Adobe segments define the colour space. Other application data is dropped.
_DROPPED = {*range(0xE0, 0xF0), 0xFE} - {0xE0, 0xEE}


def read(content: bytes) -> ImageHeader:
    """Read a JPEG file's header."""
    whole = memoryview(content)
    kept = [whole[:2]]
    frame, orientation = None, None
    first_scan = scans = 0
    for marker, start, end in _segments(content):
        if marker == _SCAN:
            scans += 1
            first_scan = first_scan or start
        if first_scan:
            continue
        if marker in _FRAMES:
            frame = marker, content[start + 4 : end]
        elif marker == _EXIF and orientation is None and content[start + 4 : start + 8] == b"Exif":
            orientation = orientation_of(content[start + 10 : end])
        if marker not in _DROPPED:
            kept.append(whole[start:end])
    if frame is None or not scans:
        raise damaged("JPEG", "it has no frame before its first scan")
    essence = b"".join([*kept, whole[first_scan:]])
    return _header(*frame, scans, content if len(essence) == len(content) else essence, orientation)


def _segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker and its range of bytes, marker included, to the image's end.

    The data of a scan belongs to no segment. Bytes after the end of the image are not read:
    cameras append videos there.
    """
    end = 2
    for _ in range(MOST_PARTS):
        match = _MARKER.search(content, end)  # decoders skip bytes between segments
        if match is None:
            return
        start = match.start()
        marker = content[start + 1]
        if marker == _END:
            return
        length = 0
        if marker not in _WITHOUT_LENGTH:
            length = content[start + 2] << 8 | content[start + 3]
            if length < 2:
                raise damaged("JPEG", "a segment has no length")
        end = start + 2 + length
        yield marker, start, end
    raise too_many_parts("JPEG")


def _header(
    marker: int, frame: bytes, scans: int, essence: bytes, orientation: int | None
) -> ImageHeader:
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    sampling = [frame[7 + 3 * index] for index in range(frame[5])]
    across = max((factors >> 4 for factors in sampling), default=0)
    down = max((factors & 15 for factors in sampling), default=0)
    if not across or not down:
        raise damaged("JPEG", "it has no components")
    pixels = width * height
    # Samples of all components per pixel.
    planes = sum((factors >> 4) * (factors & 15) for factors in sampling) / (across * down)
    if scans > MOST_SCANS or (scans > 1 and scans * pixels > MOST_SCANNED):
        raise ImageTooLargeError(
            f"the JPEG image has {scans} scans of {pixels} pixels; at most {MOST_SCANS} scans and"
            f" {MOST_SCANNED} pixels in all of them are read"
        )
    # Pixels of 4 bytes, and coefficients of 2 where scans refine them; after the coefficients are
    # freed, the upright copy or the RGB.
    coefficients = 2 * planes if scans > 1 or marker == _PROGRESSIVE else 0
    # Each block of 8 x 8 samples has a Huffman code of at least one bit.
    bits = pixels * planes / 64 if marker in _HUFFMAN_FRAMES else 0
    return ImageHeader(
        "JPEG",
        width,
        height,
        int(pixels * (4 + max(4, coefficients))),
        essence,
        orientation or 1,
        min_bytes=int(bits / 8),
    )
