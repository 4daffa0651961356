"""JPEG files: sizes that lie, and too many scans, comments or entries."""

import struct

from honest import encoded
from registry import case
from tiff import crowded_directory


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    return jpeg[:2] + segment + jpeg[2:]


def jpeg_claiming(width: int, height: int, jpeg: bytes) -> bytes:
    marker = b"\xff\xc2" if b"\xff\xc2" in jpeg else b"\xff\xc0"
    place = jpeg.index(marker) + 5
    return jpeg[:place] + struct.pack(">HH", height, width) + jpeg[place + 4 :]


@case("413-ten-thousand-scans.jpg")
def _() -> bytes:
    jpeg = encoded("JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"  # spectral selection of one component
    return jpeg[:-2] + scan * 10_000 + b"\xff\xd9"


@case("413-fifty-scans-of-thirty-six-megapixels.jpg")
def _() -> bytes:
    jpeg = jpeg_claiming(6000, 6000, encoded("JPEG", progressive=True))
    return jpeg[:-2] + b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" * 40 + b"\xff\xd9"


@case("413-four-gigapixels.jpg")
def _() -> bytes:
    return jpeg_claiming(65_535, 65_535, encoded("JPEG"))


@case("400-36-megapixels-in-a-kilobyte.jpg")
def _() -> bytes:
    return jpeg_claiming(6000, 6000, encoded("JPEG", progressive=True))


@case("400-no-rows.jpg")
def _() -> bytes:
    return jpeg_claiming(16, 0, encoded("JPEG"))


@case("400-no-scan.jpg")
def _() -> bytes:
    jpeg = encoded("JPEG")
    return jpeg[: jpeg.index(b"\xff\xda")]


@case("400-segment-without-length.jpg")
def _() -> bytes:
    return with_segment(encoded("JPEG"), b"\xff\xe1\x00\x00")


@case("413-ten-thousand-comments.jpg")
def _() -> bytes:
    return with_segment(encoded("JPEG"), jpeg_segment(0xFE, b"") * 10_500)


@case("200-exif-whose-entries-share-60-kilobytes.jpg")
def _() -> bytes:
    exif = crowded_directory(4000, 8000)
    return with_segment(encoded("JPEG"), jpeg_segment(0xE1, b"Exif\0\0" + exif))


@case("200-preview-index-of-nothing.jpg")
def _() -> bytes:
    return with_segment(encoded("JPEG"), jpeg_segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"))


@case("200-motion-photo.jpg")
def _() -> bytes:
    return encoded("JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 200  # a video behind its end
