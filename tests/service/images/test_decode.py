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
from service.images.decode import Geometry, canvas, decode, letterbox, prepare
from service.images.headers.base import (
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)

LIMIT = 1_000_000
ORIENTATION = 0x0112


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    assert image.mode == "RGB"
    return image.getpixel((x, y))


@pytest.fixture(scope="module")
def colours() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_kinds_come_back_exactly(encode, colours, kind, options):
    image = decode(encode(colours, kind, **options), LIMIT)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(colours))


def test_jpeg_is_what_pillow_decodes(encode, colours):
    content = encode(colours, "JPEG", quality=90)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(content, LIMIT)), np.asarray(expected))


def test_first_frame_of_an_animation(encode):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    content = encode(red, "GIF", save_all=True, append_images=[blue])
    assert pixel(decode(content, LIMIT)) == (255, 0, 0)


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
    corners = [pixel(image, x, y) for x, y in [(3, 3), (28, 3), (3, 12), (28, 12)]]
    # JPEG and WebP lose a little: a red is one whose green is far from white's.
    assert [green < 128 for _, green, _ in corners] == [True, False, False, False]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"MM\x00*\xff\xff\xff\xff", b"no TIFF inside"])
def test_broken_exif_beside_good_pixels_is_upright(encode, colours, exif):
    content = encode(colours, "PNG", exif=b"Exif\x00\x00" + exif)
    np.testing.assert_array_equal(np.asarray(decode(content, LIMIT)), np.asarray(colours))


def test_sixteen_bits_are_scaled_not_clipped(encode):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)  # 0, 0, 1, 1, 128, 255
    for kind in ("PNG", "TIFF"):
        image = decode(encode(Image.fromarray(values), kind), LIMIT)
        for channel in range(3):
            np.testing.assert_array_equal(np.asarray(image)[..., channel], expected)


def test_sixteen_bit_grey_whose_white_is_zero_is_inverted(encode):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    values = np.array([[0, 65535]], dtype=np.uint16)
    content = encode(Image.fromarray(values), "TIFF", tiffinfo=tags)
    image = decode(content, LIMIT)
    assert (pixel(image, 0), pixel(image, 1)) == ((255, 255, 255), (0, 0, 0))


def test_alpha_is_composited_on_white(encode):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    got = decode(encode(image), LIMIT)
    # 51 is a fifth of 255, so a fifth of black on white.
    assert [pixel(got, x) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (204, 204, 204)]


def test_grey_with_alpha_is_composited_on_white(encode):
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 255), (10, 0)])
    got = decode(encode(image), LIMIT)
    assert [pixel(got, x) for x in range(2)] == [(10, 10, 10), (255, 255, 255)]


def test_palette_becomes_its_colours_and_its_transparent_entry_white(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putdata([0, 1])
    assert pixel(decode(encode(image), LIMIT), 1) == (1, 2, 3)
    got = decode(encode(image, transparency=1), LIMIT)
    assert [pixel(got, x) for x in range(2)] == [(200, 100, 50), (255, 255, 255)]


def test_the_transparent_colour_of_a_gif_is_white(encode):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 50, 1, 2, 3])
    image.putdata([0, 1])
    got = decode(encode(image, "GIF", transparency=1), LIMIT)
    assert [pixel(got, x) for x in range(2)] == [(200, 100, 50), (255, 255, 255)]


def test_transparent_colour_of_an_rgb_image_is_white(encode, colours):
    image = Image.new("RGB", (2, 1))
    image.putdata([(9, 9, 9), (8, 8, 8)])
    got = decode(encode(image, transparency=(9, 9, 9)), LIMIT)
    assert [pixel(got, x) for x in range(2)] == [(255, 255, 255), (8, 8, 8)]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("1", 0, (0, 0, 0)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_grey_bilevel_and_cmyk(encode, mode, value, expected):
    assert pixel(decode(encode(Image.new(mode, (2, 2), value), "TIFF"), LIMIT)) == expected


def test_cmyk_jpeg(encode):
    got = pixel(decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), LIMIT))
    # A flat colour survives JPEG but for rounding in its transform.
    np.testing.assert_allclose(got, (255, 0, 0), atol=2)


def test_first_image_of_an_animated_png_and_webp(encode):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encode(red, kind, save_all=True, append_images=[blue], **options)
        assert pixel(decode(content, LIMIT)) == (255, 0, 0)


def test_first_page_of_a_tiff(encode):
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (9, 9), "blue")
    image = decode(encode(red, "TIFF", save_all=True, append_images=[blue]), LIMIT)
    assert (image.size, pixel(image)) == ((4, 4), (255, 0, 0))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sixteen_bit_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit RGB, which Pillow does not write."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def test_sixteen_bit_colour_keeps_its_high_byte():
    values = np.array([[[0, 255, 256], [32768, 65279, 65535]]], dtype=np.uint16)
    got = np.asarray(decode(sixteen_bit_png(values), LIMIT))
    np.testing.assert_array_equal(got, values >> 8)


def test_twelve_bit_grey_is_scaled_to_its_own_white():
    # Four values of 12 bits in six bytes, as TIFF packs them.
    data = bytes.fromhex("000 800 fff 7ff".replace(" ", ""))
    tags = {256: (3, 4), 257: (3, 1), 258: (3, 12), 259: (3, 1), 262: (3, 1)}
    tags |= {273: (4, 8), 277: (3, 1), 278: (3, 1), 279: (4, 6)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, (kind, v) in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    content = b"II*\0" + struct.pack("<I", 14) + data + directory
    got = decode(content, LIMIT)
    assert [pixel(got, x)[0] for x in range(4)] == [0, 128, 255, 127]


def test_bilevel_and_grey_png(encode):
    assert pixel(decode(encode(Image.new("1", (2, 2), 1)), LIMIT)) == (255, 255, 255)
    assert pixel(decode(encode(Image.new("L", (2, 2), 9)), LIMIT)) == (9, 9, 9)


def test_cmyk_jpeg_with_and_without_adobes_marker_is_inverted(encode):
    # Both are: nobody writes the other kind, and Pillow takes Adobe's habit for the rule.
    content = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    start = content.index(b"\xff\xee")
    length = struct.unpack_from(">H", content, start + 2)[0]
    without = content[:start] + content[start + 2 + length :]
    for one in (content, without):
        np.testing.assert_allclose(
            pixel(decode(one, LIMIT)), (255, 0, 0), atol=2
        )  # JPEG's rounding


def test_adobes_marker_says_what_the_colours_of_a_jpeg_mean(encode):
    content = encode(Image.new("RGB", (8, 8), (250, 20, 60)), "JPEG")
    length = struct.unpack_from(">H", content, 4)[0]  # of JFIF's segment, which means YCbCr
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # 0: as it is, RGB
    other = content[:2] + adobe + content[4 + length :]
    expected = Image.open(io.BytesIO(other)).convert("RGB").getpixel((0, 0))
    assert pixel(decode(other, LIMIT)) == expected
    assert expected != pixel(decode(content, LIMIT))


def test_alpha_is_composited_alike_across_bands(encode):
    # Taller than what is converted at a time, and not a multiple of it.
    rng = np.random.default_rng(2)
    values = rng.integers(0, 256, (150, 5, 4), dtype=np.uint8)
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
def test_modes_without_a_known_white_are_refused(encode, mode):
    with pytest.raises(UnsupportedImageError, match=f"mode {mode}"):
        decode(encode(Image.new(mode, (2, 2)), "TIFF"), LIMIT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_truncated_image_is_damaged(encode, kind):
    content = encode(Image.effect_noise((64, 64), 80).convert("RGB"), kind)
    for cut in (len(content) // 2, 20):
        with pytest.raises(DamagedImageError, match="image"):
            decode(content[:cut], LIMIT)


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"RIFF\0\0\0\0WAVE",
        b"B",
    ],
)
def test_what_is_no_image_is_unsupported(content):
    with pytest.raises(UnsupportedImageError, match="JPEG, PNG, WebP, BMP, TIFF, GIF"):
        decode(content, LIMIT)


def test_other_kinds_that_pillow_knows_are_unsupported(encode, colours):
    for kind in ("ICO", "PPM", "JPEG2000", "PCX"):
        with pytest.raises(UnsupportedImageError):
            decode(encode(colours, kind), LIMIT)


def test_no_bytes_is_damaged():
    with pytest.raises(DamagedImageError, match="empty"):
        decode(b"", LIMIT)


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.mark.parametrize(("width", "height"), [(1001, 1000), (10_000, 10_000), (20_000, 20_000)])
def test_pixel_limit_is_read_from_the_header(width, height):
    # There are no pixels behind the header: whoever began to decode would say "damaged".
    with pytest.raises(ImageTooLargeError, match=f"{LIMIT}"):
        decode(png_claiming(width, height), LIMIT)


def test_an_image_of_the_very_limit_is_read(encode):
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


@pytest.mark.parametrize("size", [(96, 64), (200, 50), (50, 200), (33, 77), (1, 500), (7, 5)])
def test_letterbox_is_the_cards_arithmetic(size):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    row, geometry = letterbox(image, PREPROCESSING)
    width, height = PREPROCESSING.resized(*size)
    expected = np.full((64, 96, 3), 114, dtype=np.uint8)
    expected[:height, :width] = image.resize((width, height), Image.Resampling.BILINEAR)
    truth = (expected / np.float64(255) - PREPROCESSING.mean) / PREPROCESSING.std
    assert row.dtype == np.float32
    assert row.flags.c_contiguous
    # Three float32 roundings of numbers up to 1 / 0.2 = 5.
    np.testing.assert_allclose(row, truth.transpose(2, 0, 1), atol=3 * 5 * 2**-24, rtol=0)
    assert geometry == Geometry(*size, width, height)


@pytest.mark.parametrize("size", [(96, 64), (200, 50), (50, 200), (7, 5)])
def test_letterbox_is_evaluations_bit_for_bit(size):
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    config = DetectorConfig(
        class_names=["a"], image_size=(64, 96), mean=PREPROCESSING.mean, std=PREPROCESSING.std
    )
    expected, _ = Letterbox(config)(image)
    np.testing.assert_array_equal(letterbox(image, PREPROCESSING)[0], expected.numpy())


def test_letterbox_keeps_channels_apart():
    row, _ = letterbox(Image.new("RGB", (96, 64), (255, 0, 0)), PREPROCESSING)
    assert row[:, 0, 0] == pytest.approx([0.5 / 0.2, -0.4 / 0.25, -0.3 / 0.3], abs=1e-6)  # float32


@pytest.mark.parametrize("fit", [letterbox, canvas])
def test_letterbox_refuses_other_modes(fit):
    with pytest.raises(ValueError, match="got L"):
        fit(Image.new("L", (4, 4)), PREPROCESSING)


def test_an_image_is_prepared_for_what_the_model_takes(card):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (33, 77, 3), dtype=np.uint8))
    for kind, fit in (("float32", letterbox), ("uint8", canvas)):
        row, geometry = prepare(image, card.model_copy(update={"input": kind}))
        wanted, its_geometry = fit(image, card.preprocessing)
        assert row.dtype == kind
        np.testing.assert_array_equal(row, wanted)
        assert geometry == its_geometry


def test_the_canvas_is_what_is_normalised():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (33, 77, 3), dtype=np.uint8))
    pixels, _ = canvas(image, PREPROCESSING)
    assert (pixels.shape, pixels.dtype) == ((64, 96, 3), np.uint8)
    normalised = (pixels / 255 - PREPROCESSING.mean) / PREPROCESSING.std
    # Three float32 roundings of numbers up to 1 / 0.2 = 5.
    row, _ = letterbox(image, PREPROCESSING)
    np.testing.assert_allclose(row, normalised.transpose(2, 0, 1), atol=3 * 5 * 2**-24, rtol=0)


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


def test_geometry_of_no_boxes():
    assert Geometry(4, 4, 4, 4).to_image(np.zeros((0, 4), np.float32)).shape == (0, 4)
