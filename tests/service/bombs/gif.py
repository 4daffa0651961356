"""GIF files: screens, frames and extensions that lie or never end."""

from honest import encoded
from registry import case


@case("413-screen-of-four-gigapixels.gif")
def _() -> bytes:
    gif = encoded("GIF")
    return gif[:6] + b"\xff\xff\xff\xff" + gif[10:]


@case("413-frame-beyond-its-screen.gif")
def _() -> bytes:
    gif = encoded("GIF")
    place = gif.index(b",\0\0\0\0")
    return gif[: place + 1] + b"\xf0\xff" * 4 + gif[place + 9 :]


@case("400-no-image.gif")
def _() -> bytes:
    return encoded("GIF")[:13] + b";"


@case("413-comment-in-ten-thousand-pieces.gif")
def _() -> bytes:
    gif = encoded("GIF")
    head = 13 + (3 << (gif[10] & 7) + 1)
    return gif[:head] + b"!\xfe" + b"\x01x" * 10_500 + b"\0" + gif[head:]


@case("400-extensions-without-end.gif")
def _() -> bytes:
    return encoded("GIF")[:13] + b"!\xfe\xff" * 20
