"""Small and honest files, of every kind and variant; lying ones are made of them."""

import io
from collections.abc import Callable

from PIL import Image
from registry import BUILDERS


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


HONEST: dict[str, Callable[[], bytes]] = {
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
BUILDERS |= HONEST
