"""Image files of data sets: the pixels of training are those of the service, or both refuse."""

import io

import numpy as np
import pytest
from PIL import Image

from ghm_triton.detection.data.files import ImageFile, UnusableError, load_image, probe_image
from ghm_triton.images.decode import decode
from ghm_triton.images.header import DamagedImageError, ImageError

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"'
    b"/></rdf:RDF></x:xmpmeta>"
)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8))
DEEP = Image.fromarray(np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85)


def encode(kind: str, image: Image.Image | str = "RGB", turn: int = 0, **options: object) -> bytes:
    if turn:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = turn
    buffer = io.BytesIO()
    image = NOISE.convert(image) if isinstance(image, str) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


READ = {
    **{f"{kind} with alpha": encode(kind, "RGBA") for kind in ("PNG", "WEBP", "TIFF")},
    "grey with alpha": encode("PNG", "LA"),
    "transparent colour": encode("PNG", Image.new("RGB", (9, 9), "red"), transparency=(255, 0, 0)),
    "transparent palette entry": encode("PNG", "P", transparency=3),
    "transparent GIF": encode("GIF", "P", transparency=3),
    **{f"16-bit {kind}": encode(kind, DEEP) for kind in ("PNG", "TIFF")},
    "bilevel": encode("PNG", "1"),
    **{f"CMYK {kind}": encode(kind, "CMYK") for kind in ("JPEG", "TIFF")},
    **{f"{k} turned {n}": encode(k, turn=n) for k in ("JPEG", "PNG", "TIFF") for n in (3, 5, 6)},
    "WEBP turned 8": encode("WEBP", turn=8),
    **{f"{kind} with XMP": encode(kind, xmp=XMP) for kind in ("JPEG", "WEBP")},
    "video behind the end": encode("JPEG") + b"\xff\xda" * 200,
    "two pages": encode("TIFF", save_all=True, append_images=[DEEP]),
    **{f"{w} x {h} JPEG": encode("JPEG", NOISE.convert("RGB").resize((w, h)))
       for w, h in ((1, 1), (5, 90), (90, 7))},
}  # fmt: skip
REFUSED = {
    **{kind: encode(kind) for kind in ("AVIF", "JPEG2000", "PPM", "ICO")},
    "Lab": encode("TIFF", "LAB"),
    **{f"mode {mode}": encode("TIFF", Image.new(mode, (9, 9))) for mode in ("I", "F")},
}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_training_sees_the_pixels_that_the_service_sees(tmp_path, content, verify):
    path = tmp_path / "image"
    path.write_bytes(content)
    served = decode(content)
    file = probe_image(path, None, verify=verify)
    assert file.size == served.size
    np.testing.assert_array_equal(np.asarray(load_image(file)), np.asarray(served))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_what_the_service_refuses_is_no_image_of_a_data_set(tmp_path, content, verify):
    path = tmp_path / "image"
    path.write_bytes(content)
    with pytest.raises(ImageError) as refused:
        decode(content)
    with pytest.raises(UnusableError) as caught:
        probe_image(path, None, verify=verify)
    assert str(caught.value) == f"the image cannot be read ({refused.value})"


def test_an_image_that_changed_since_it_was_probed_is_refused(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encode("PNG"))
    with pytest.raises(DamagedImageError, match="was 32 x 9 pixels and is 32 x 24"):
        load_image(ImageFile(path, (32, 9), as_stored=False))
