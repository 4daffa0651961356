"""Files of kinds that are not read."""

from honest import encoded
from registry import case


@case("415-icon.ico")
def _() -> bytes:
    return encoded("ICO")


@case("415-picture.avif")
def _() -> bytes:
    return encoded("AVIF")


@case("415-picture.jp2")
def _() -> bytes:
    return encoded("JPEG2000")


@case("415-document.pdf")
def _() -> bytes:
    return b"%PDF-1.7\n"
