import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from export.card import Preprocessing
from ghm_triton.detection.data.transforms import Letterbox
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.images.decode import decode
from ghm_triton.images.header import (
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from service.images import Geometry, canvas, letterbox, prepare

LIMIT = 1_000_000
ORIENTATION = 0x0112


KINDS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]


def pixels(image: Image.Image) -> list[tuple[int, int, int]]:
    """The first row."""
    assert image.mode == "RGB"
    return [image.getpixel((x, 0)) for x in range(image.width)]


def row(mode: str, *values: object, palette: list[int] | None = None) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    if palette:
        image.putpalette(palette)
    image.putdata(values)
    return image


@pytest.fixture(scope="module")
def colours() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "JPEG"])
def test_pixels_are_those_that_were_stored(encode, colours, kind):
    content = encode(colours, kind, **({"lossless": True} if kind == "WEBP" else {}))
    stored = Image.open(io.BytesIO(content)).convert("RGB") if kind == "JPEG" else colours
    np.testing.assert_array_equal(np.asarray(decode(content, LIMIT)), np.asarray(stored))


WHITE = (255, 255, 255)
PALETTE = [200, 100, 50, 1, 2, 3]
GREY = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)  # scaled by 1 / 257, and rounded
INVERTED = TiffImagePlugin.ImageFileDirectory_v2()
INVERTED[262] = 0  # white is zero


@pytest.mark.parametrize(
    ("image", "kind", "options", "expected"),
    [
        # 51 is a fifth of 255, so a fifth of black on white.
        (
            row("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)),
            *("PNG", {}, [(255, 0, 0), WHITE, (204, 204, 204)]),
        ),
        (row("LA", (10, 255), (10, 0)), "PNG", {}, [(10, 10, 10), WHITE]),
        (row("P", 0, 1, palette=PALETTE), "PNG", {}, [(200, 100, 50), (1, 2, 3)]),
        *[
            (
                row("P", 0, 1, palette=PALETTE),
                *(kind, {"transparency": 1}, [(200, 100, 50), WHITE]),
            )
            for kind in ("PNG", "GIF")
        ],
        (
            row("RGB", (9, 9, 9), (8, 8, 8)),
            *("PNG", {"transparency": (9, 9, 9)}, [WHITE, (8, 8, 8)]),
        ),
        *[(row("L", 77), kind, {}, [(77, 77, 77)]) for kind in ("PNG", "TIFF")],
        *[(row("1", 1, 0), kind, {}, [WHITE, (0, 0, 0)]) for kind in ("PNG", "TIFF")],
        (
            row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)),
            *("TIFF", {}, [(255, 0, 0), (0, 0, 0)]),
        ),
        *[
            (Image.fromarray(GREY), kind, {}, [(v, v, v) for v in (0, 0, 1, 1, 128, 255)])
            for kind in ("PNG", "TIFF")
        ],
        (
            Image.fromarray(np.array([[0, 65535]], np.uint16)),
            *("TIFF", {"tiffinfo": INVERTED}, [WHITE, (0, 0, 0)]),
        ),
    ],
)
def test_modes_become_rgb_on_white(encode, image, kind, options, expected):
    assert pixels(decode(encode(image, kind, **options), LIMIT)) == expected


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_or_document(encode, kind):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (9, 9), "blue")
    others = [blue if kind == "TIFF" else blue.resize((4, 4))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(encode(red, kind, save_all=True, append_images=others, **options), LIMIT)
    assert (image.size, image.getpixel((0, 0))) == ((4, 4), (255, 0, 0))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(encode, kind, orientation):
    upright = Image.new("RGB", (32, 16), "white")
    upright.paste("red", (0, 0, 16, 8))  # the upper left quarter
    stored_as = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = decode(encode(stored_as, kind, exif=exif), LIMIT)
    assert image.size == (32, 16)
    corners = [image.getpixel(place) for place in [(3, 3), (28, 3), (3, 12), (28, 12)]]
    # JPEG and WebP lose a little: a red is one whose green is far from white's.
    assert [green < 128 for _, green, _ in corners] == [True, False, False, False]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\x00*\xff\xff\xff\xff", b"no TIFF inside"])
def test_broken_exif_beside_good_pixels_is_upright(encode, colours, exif):
    content = encode(colours, "PNG", exif=b"Exif\x00\x00" + exif)
    np.testing.assert_array_equal(np.asarray(decode(content, LIMIT)), np.asarray(colours))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, data: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def test_sixteen_bit_colour_keeps_its_high_byte():
    values = np.array([[[0, 255, 256], [32768, 65279, 65535]]], dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    got = np.asarray(decode(png(2, 1, 16, zlib.compress(rows)), LIMIT))
    np.testing.assert_array_equal(got, values >> 8)


def test_twelve_bit_grey_is_scaled_to_its_own_white():
    # Four values of 12 bits in six bytes, as TIFF packs them.
    data = bytes.fromhex("000 800 fff 7ff".replace(" ", ""))
    tags = {256: (3, 4), 257: (3, 1), 258: (3, 12), 259: (3, 1), 262: (3, 1)}
    tags |= {273: (4, 8), 277: (3, 1), 278: (3, 1), 279: (4, 6)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, (kind, v) in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    content = b"II*\0" + struct.pack("<I", 14) + data + directory
    assert [red for red, _, _ in pixels(decode(content, LIMIT))] == [0, 128, 255, 127]


def test_cmyk_jpeg_is_inverted_with_and_without_adobes_marker(encode):
    # Files without the marker are inverted too: Pillow takes Adobe's convention for the rule.
    content = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    start = content.index(b"\xff\xee")
    length = struct.unpack_from(">H", content, start + 2)[0]
    for one in (content, content[:start] + content[start + 2 + length :]):
        got = decode(one, LIMIT).getpixel((0, 0))
        np.testing.assert_allclose(got, (255, 0, 0), atol=2)  # JPEG's rounding


def test_adobes_marker_defines_the_colours_of_a_jpeg(encode):
    content = encode(Image.new("RGB", (8, 8), (250, 20, 60)), "JPEG")
    length = struct.unpack_from(">H", content, 4)[0]  # of JFIF's segment, which means YCbCr
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # 0: RGB
    other = content[:2] + adobe + content[4 + length :]
    expected = Image.open(io.BytesIO(other)).convert("RGB")
    assert pixels(decode(other, LIMIT)) == pixels(expected) != pixels(decode(content, LIMIT))


def test_alpha_is_composited_alike_across_bands(encode):
    # Taller than what is converted at a time, and not a multiple of it.
    rng = np.random.default_rng(2)
    values = rng.integers(0, 256, (200, 700, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    white = Image.new("RGBA", image.size, "white")
    expected = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode(encode(image), LIMIT)), expected)


def test_texts_and_profiles_do_not_matter(encode, colours):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 10_000, zip=True)
    plain = encode(colours)
    content = encode(colours, pnginfo=info, icc_profile=b"\0" * 500, dpi=(300, 300))
    assert len(content) > len(plain)
    np.testing.assert_array_equal(np.asarray(decode(content, LIMIT)), np.asarray(colours))


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_a_defined_white_are_refused(encode, mode):
    with pytest.raises(UnsupportedImageError, match=f"mode {mode}"):
        decode(encode(Image.new(mode, (2, 2)), "TIFF"), LIMIT)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_image_is_damaged(encode, kind):
    content = encode(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for cut in (len(content) // 2, 20):
        with pytest.raises(DamagedImageError, match="image"):
            decode(content[:cut], LIMIT)


@pytest.mark.parametrize(
    "content",
    [
        *(b"hello", b"%PDF-1.7", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        *(b"RIFF\0\0\0\0WAVE", b"B", "ICO", "PPM", "JPEG2000", "PCX"),
    ],
)
def test_other_formats_are_unsupported(encode, colours, content):
    content = encode(colours, content) if isinstance(content, str) else content
    with pytest.raises(UnsupportedImageError, match="JPEG, PNG, WebP, BMP, TIFF, GIF"):
        decode(content, LIMIT)


def test_no_bytes_is_damaged():
    with pytest.raises(DamagedImageError, match="empty"):
        decode(b"", LIMIT)


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (10_000, 10_000), (20_000, 20_000)])
def test_pixel_limit_is_read_from_the_header(encode, width, height):
    # There are no pixels behind the header: decoding them would report damage.
    with pytest.raises(ImageTooLargeError, match=f"{LIMIT}"):
        decode(png(width, height, 8, b""), LIMIT)
    assert decode(encode(Image.new("L", (100, 10))), 1000).size == (100, 10)


def check_image_or_image_error(content: bytes) -> None:
    """Whatever else is raised fails the test."""
    try:
        image = decode(content, LIMIT)
    except ImageError:
        return
    assert image.mode == "RGB"


SIGNATURES = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"GIF89a", b"II*\0", b"MM\0*"]
SIGNATURES += [b"MM\0+", b"RIFF\x20\0\0\0WEBPVP8 ", b""]


@settings(max_examples=150, deadline=None)
@given(prefix=st.sampled_from(SIGNATURES), tail=st.binary(max_size=300))
def test_any_bytes_are_an_image_or_an_image_error(prefix, tail):
    check_image_or_image_error(prefix + tail)


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_any_damage_to_an_image_is_an_image_or_an_image_error(encode, kind, damage):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {} if kind in ("BMP", "GIF") else {"exif": exif}
    content = bytearray(encode(Image.linear_gradient("L").resize((16, 16)), kind, **options))
    for place, value in damage:
        content[round(place * (len(content) - 1))] = value
    check_image_or_image_error(bytes(content))


PREPROCESSING = Preprocessing(height=64, width=96, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


@pytest.fixture
def random_image():
    def make(width: int, height: int) -> Image.Image:
        rng = np.random.default_rng(width)
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    return make


@pytest.mark.parametrize("size", [(96, 64), (200, 50), (50, 200), (33, 77), (1, 500), (7, 5)])
def test_letterbox_is_the_cards_arithmetic_and_evaluations_bit_for_bit(random_image, size):
    image = random_image(*size)
    width, height = PREPROCESSING.resized(*size)
    expected = np.full((64, 96, 3), 114, dtype=np.uint8)
    expected[:height, :width] = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels, geometry = canvas(image, PREPROCESSING)
    np.testing.assert_array_equal(pixels, expected)
    assert geometry == Geometry(*size, width, height)
    truth = (expected / np.float64(255) - PREPROCESSING.mean) / PREPROCESSING.std
    row, same = letterbox(image, PREPROCESSING)
    assert same == geometry
    assert row.dtype == np.float32
    assert row.flags.c_contiguous
    # Three float32 roundings of numbers up to 1 / 0.2 = 5.
    np.testing.assert_allclose(row, truth.transpose(2, 0, 1), atol=3 * 5 * 2**-24, rtol=0)
    config = DetectorConfig(
        class_names=["a"], image_size=(64, 96), mean=PREPROCESSING.mean, std=PREPROCESSING.std
    )
    np.testing.assert_array_equal(row, Letterbox(config)(image)[0].numpy())


@pytest.mark.parametrize("fit", [letterbox, canvas])
def test_letterbox_refuses_other_modes(fit):
    with pytest.raises(ValueError, match="got L"):
        fit(Image.new("L", (4, 4)), PREPROCESSING)


@pytest.mark.parametrize(("kind", "fit"), [("float32", letterbox), ("uint8", canvas)])
def test_an_image_is_prepared_for_the_models_input(card, random_image, kind, fit):
    image = random_image(77, 33)
    row, geometry = prepare(image, card.model_copy(update={"input": kind}))
    expected, same = fit(image, card.preprocessing)
    assert (row.dtype, geometry) == (kind, same)
    np.testing.assert_array_equal(row, expected)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_geometry_takes_boxes_there_and_back(width, height, corners):
    resized = PREPROCESSING.resized(width, height)
    inside = (np.array(corners) * [*resized, *resized]).astype(np.float32)
    back = Geometry(width, height, *resized).to_image(inside[None])[0]
    truth = np.array(corners) * [width, height, width, height]
    # float32 in the input's pixels, magnified by the scale.
    tolerance = max(width, height) * 2**-23
    np.testing.assert_allclose(back, truth, atol=tolerance, rtol=0)


def test_geometry_clips_to_the_image():
    geometry = Geometry(width=200, height=50, resized_width=96, resized_height=24)
    boxes = np.array([[-5, -5, 96, 64], [10, 30, 20, 40]], dtype=np.float32)
    back = geometry.to_image(boxes)
    np.testing.assert_array_equal(back[0], [0, 0, 200, 50])
    np.testing.assert_array_equal(back[1, [1, 3]], [50, 50])
    assert geometry.to_image(np.zeros((0, 4), np.float32)).shape == (0, 4)


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading")])
def test_a_lack_of_memory_is_no_damage(encode, colours, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode(encode(colours, "PNG"), LIMIT)


@pytest.mark.parametrize(
    ("last", "expected"), [(0, [(9, 8, 7), (1, 2, 3)]), (255, [WHITE, (1, 2, 3)])]
)
def test_alpha_of_a_bmp_counts_unless_it_is_0_everywhere(last, expected):
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = struct.pack("<IiiHHIIiiII", 108, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0) + masks.ljust(68, b"\0")
    pixels_bgra = bytes([7, 8, 9, 0, 3, 2, 1, last])
    content = b"BM" + struct.pack("<IHHI", 130, 0, 0, 122) + info + pixels_bgra
    assert pixels(decode(content, LIMIT)) == expected
