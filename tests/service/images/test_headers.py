"""Headers of every format, and the corpus of hostile files."""

import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ghm_triton.images.decode import decode
from ghm_triton.images.header import (
    DamagedImageError,
    ImageError,
    ImageTooLargeError,
    UnsupportedImageError,
)
from ghm_triton.images.headers import measure

EVERYTHING = sorted((Path(__file__).parents[1] / "corpus").iterdir())
CORPUS = [path for path in EVERYTHING if path.name[0].isdigit()]  # the others are bodies
STATUS = {DamagedImageError: 400, ImageTooLargeError: 413, UnsupportedImageError: 415}
LIMIT = 40_000_000
KINDS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]


@pytest.fixture(scope="module")
def colours() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_every_file_of_the_corpus_is_answered_as_its_name_says(path):
    try:
        decode(path.read_bytes(), LIMIT)
        status = 200
    except ImageError as error:
        status = STATUS[type(error)]
    assert status == int(path.name[:3])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("36-megapixels-in-a-kilobyte.jpg", "are too few for"),
        ("40-megapixels-in-100-bytes.png", "are too few for"),
        ("36-megapixels-and-no-bytes.bmp", "are too few for"),
        ("uncompressed-and-not-there.tif", "are too few for"),
        ("lossless-of-36-megapixels-and-no-bits.webp", "are too few for"),
        ("tiles-of-no-width.tif", "tiles of no size"),
    ],
)
def test_more_pixels_than_the_bytes_can_hold_are_refused_by_the_header(name, reason):
    (path,) = [path for path in CORPUS if path.name == f"400-{name}"]
    with pytest.raises(DamagedImageError, match=reason):
        measure(path.read_bytes(), LIMIT)


def test_every_file_of_the_corpus_has_its_builder():
    names = runpy.run_path(str(CORPUS[0].parents[1] / "bombs.py"), run_name="bombs")
    assert sorted(names["BUILDERS"]) == [path.name for path in EVERYTHING]


PEAK = """
import sys
from pathlib import Path
from ghm_triton.images.decode import decode
from ghm_triton.images.header import ImageError

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kilobytes("VmRSS")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        decode(path.read_bytes(), 40_000_000)
    except ImageError:
        pass
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_file_of_the_corpus_takes_50_megabytes():
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(CORPUS[0].parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50 * 1024


@pytest.mark.parametrize("kind", KINDS)
def test_size_as_stored_and_orientation(encode, colours, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    can_turn = kind not in ("BMP", "GIF")
    header = measure(encode(colours, kind, **({"exif": exif} if can_turn else {})), LIMIT)
    assert header.kind.upper() == kind
    # Pillow applies TIFF's orientation, to the size as well.
    assert (header.width, header.height) == ((13, 17) if kind == "TIFF" else (17, 13))
    assert header.orientation == (6 if kind in ("JPEG", "PNG", "WEBP") else 1)


def test_orientation_behind_a_chunk_of_odd_length(encode, colours):
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(colours, "WEBP", exif=exif)
    place = content.index(b"EXIF")
    longer = content[:place] + b"junk\3\0\0\0abc\0" + content[place:]
    sized = longer[:4] + (len(longer) - 8).to_bytes(4, "little") + longer[8:]
    assert measure(sized, LIMIT).orientation == 6


@pytest.mark.parametrize("kind", KINDS)
def test_what_decoding_needs_is_kept(encode, colours, kind):
    content = encode(colours, kind)
    essence = measure(content, LIMIT).essence
    whole, part = (Image.open(io.BytesIO(one)).convert("RGB") for one in (content, essence))
    np.testing.assert_array_equal(np.asarray(part), np.asarray(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_is_an_image_error_or_the_image(encode, colours, kind):
    content = encode(colours, kind)
    for size in range(len(content)):
        try:
            assert decode(content[:size], LIMIT).size == colours.size
        except ImageError:
            continue
        # Some decoders do not miss the last bytes: checksums, a trailer, padding.
        assert size >= len(content) - 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_too_many_is_refused(encode, colours, kind):
    content = encode(colours, kind)
    assert measure(content, 17 * 13).width == 17
    with pytest.raises(ImageTooLargeError, match="17 x 13 pixels; at most 220 are read"):
        measure(content, 17 * 13 - 1)


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536)])
def test_a_side_too_long_is_refused(encode, size):
    assert measure(encode(Image.new("L", (65_535, 1)), "PNG"), LIMIT).width == 65_535
    with pytest.raises(ImageTooLargeError, match="at most 65535 of a side"):
        measure(encode(Image.new("L", size), "PNG"), 65_536)


MEMORY = """
import io, sys
import numpy as np
from pathlib import Path
from PIL import Image
from types import SimpleNamespace
from export.card import Preprocessing
from ghm_triton.images.decode import decode
from ghm_triton.images.headers import measure
from service.images import prepare, prepare_bytes

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()

image = Image.linear_gradient("L").resize((2000, 1500)).convert("RGB")
turned = Image.Exif()
turned[0x0112] = 6
grey = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
files = {
    "jpeg": encoded(image, "JPEG", exif=turned),
    "progressive": encoded(image, "JPEG", progressive=True, subsampling=0, exif=turned),
    "cmyk": encoded(image.convert("CMYK"), "JPEG", exif=turned),
    "png": encoded(image.convert("RGBA"), "PNG", compress_level=1, exif=turned),
    "grey": encoded(grey, "PNG", compress_level=1),
    "webp": encoded(image, "WEBP", method=0, exif=turned),
    "bmp": encoded(image, "BMP"),
    "tiff": encoded(image, "TIFF", exif=turned),
    "gif": encoded(image.convert("P"), "GIF", transparency=3),
}
for size in ((65_535, 61), (61, 65_535), (20, 20)):
    files[str(size)] = encoded(Image.new("RGBA", size, (9, 9, 9, 9)), "PNG")
del image, grey
norm = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
card = SimpleNamespace(
    input=sys.argv[1], preprocessing=Preprocessing(height=1280, width=1280, **norm)
)
for name, content in files.items():
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = kilobytes("VmRSS")
    bound = measure(content, 10**7).decoded_bytes
    image = decode(content, 10**7)
    decoded = kilobytes("VmHWM")
    prepare(image, card)
    del image
    peak = (kilobytes("VmHWM") - before) * 1024
    print((decoded - before) * 1024, bound, peak, bound + prepare_bytes(card), name, sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_the_memory_of_decoding_and_preparing_is_bounded(kind):
    # Blocks that were freed are not kept for the next file, which would seem to need less.
    told = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEMORY, kind]
    done = subprocess.run(command, capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stderr
    rows = [list(map(int, line.split("|")[:4])) for line in done.stdout.splitlines()]
    assert len(rows) == 12, done.stdout
    for decoding, bound, both, bound_of_both in rows:
        assert decoding <= bound, done.stdout
        assert both <= bound_of_both, done.stdout
    # A bound far above the truth would send away what fits: none is more than thrice the most.
    assert max(bound / (2000 * 1500) for _, bound, _, _ in rows[:9]) < 22
