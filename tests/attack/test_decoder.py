"""Kind 12: training and serving see the same pixels of a file, or both refuse it."""

import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from ghm_triton.detection.data import open_dataset
from tests.attack.core import cases

SIZE = (768, 512)  # so large that the service draws at the same scale
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
    b"/></rdf:RDF></x:xmpmeta>"
)


def ramp(mode: str = "RGB") -> Image.Image:
    """Pixels that tell sides and channels apart."""
    x, y = np.meshgrid(np.arange(SIZE[0]) // 3, np.arange(SIZE[1]) // 2)
    if mode == "I;16":
        return Image.fromarray((x * 257 + y).astype(np.uint16))
    image = Image.fromarray(np.stack([x, y, x ^ y], -1).astype(np.uint8))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray((255 - x).astype(np.uint8)))
    return image.convert(mode)


def saved(kind: str, mode: str = "RGB", orientation: int = 0, **options: object) -> bytes:
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    buffer = io.BytesIO()
    ramp(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def clear_bitmap() -> bytes:
    """32 bits a pixel of which the last 8 are zero, as many programs write them."""
    content = bytearray(saved("BMP", "RGBA"))
    start = int.from_bytes(content[10:14], "little")
    content[start + 3 :: 4] = bytes(len(content[start + 3 :: 4]))
    return bytes(content)


def animation(kind: str) -> bytes:
    buffer = io.BytesIO()
    ramp().save(buffer, kind, save_all=True, append_images=[Image.new("RGB", SIZE)])
    return buffer.getvalue()


SHAPES: dict[str, Callable[[], bytes]] = {
    "alpha of PNG": lambda: saved("PNG", "RGBA"),
    "alpha of grey": lambda: saved("PNG", "LA"),
    "clear colour": lambda: saved("PNG", transparency=(0, 0, 0)),
    "clear grey": lambda: saved("PNG", "L", transparency=0),
    "clear entry of a palette": lambda: saved("PNG", "P", transparency=3),
    "clear entry of a GIF": lambda: saved("GIF", "P", transparency=3),
    "alpha of WebP": lambda: saved("WEBP", "RGBA", lossless=True),
    "alpha of TIFF": lambda: saved("TIFF", "RGBA"),
    "bitmap whose alpha is 0": clear_bitmap,
    "16-bit PNG": lambda: saved("PNG", "I;16"),
    "16-bit TIFF": lambda: saved("TIFF", "I;16"),
    "32-bit TIFF": lambda: saved("TIFF", "F"),
    "Lab": lambda: saved("TIFF", "LAB"),
    "CMYK": lambda: saved("JPEG", "CMYK", quality=95),
    "bilevel": lambda: saved("PNG", "1"),
    "orientation of JPEG": lambda: saved("JPEG", orientation=6),
    "mirrored JPEG": lambda: saved("JPEG", orientation=5),
    "orientation of PNG": lambda: saved("PNG", orientation=8),
    "orientation of TIFF": lambda: saved("TIFF", orientation=6),
    "orientation of WebP": lambda: saved("WEBP", orientation=3, lossless=True),
    "orientation that is none": lambda: saved("JPEG", orientation=9),
    "XMP of JPEG": lambda: saved("JPEG", xmp=XMP),
    "XMP of WebP": lambda: saved("WEBP", xmp=XMP, lossless=True),
    "AVIF": lambda: saved("AVIF"),
    "JPEG 2000": lambda: saved("JPEG2000"),
    "motion photo": lambda: saved("JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 200,
    "animated GIF": lambda: animation("GIF"),
    "animated PNG": lambda: animation("PNG"),
    "document of two pages": lambda: animation("TIFF"),
    "PNG cut short": lambda: saved("PNG")[:-40],
    "JPEG cut short": lambda: saved("JPEG")[:-200],
    "PPM": lambda: saved("PPM"),
    "ICO": lambda: saved("ICO"),
}
SEEN = {"motion photo", "bitmap whose alpha is 0"}  # by both


def trained(folder, content: bytes) -> np.ndarray | None:
    """The pixels in a data set; None if the file is dropped or refused."""
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    truth = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    (folder / "annotations" / "train.json").write_text(json.dumps(truth))
    try:
        samples = open_dataset(f"coco:{folder}", "train")
        return np.asarray(samples[0].image) if len(samples) else None
    except ValueError:
        return None


@pytest.mark.parametrize(("name", "make"), cases(12, {k: (k, v) for k, v in SHAPES.items()}))
def test_training_and_serving_see_the_same(service, tmp_path, name, make):
    content = make()
    answer = service.ask("/v1/detect?format=image&threshold=1", content, Accept="image/png")
    pixels = trained(tmp_path, content)
    assert answer.status in (200, 400, 415)
    assert (answer.status == 200) == (pixels is not None), answer
    if pixels is not None:
        served = np.asarray(Image.open(io.BytesIO(answer.body)).convert("RGB"))
        assert served.shape == pixels.shape
        assert (served == pixels).all()
        assert len(np.unique(pixels)) > 1
    assert pixels is not None or name not in SEEN
