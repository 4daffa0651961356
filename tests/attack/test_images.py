"""Kind 4: a small file of many pixels costs no more memory than the budget, and no one's time."""

import io
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageDraw

from tests.attack.core import MIB, PATIENCE, Canary, Service, cases, serving

MEGAPIXELS = 10
BUDGET = 128 * MIB  # of decoded images
SLACK = 48 * MIB  # bodies, answers, the model and what the allocator keeps
AT_ONCE = 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, colour: int = 2, depth: int = 8, interlaced: int = 0) -> bytes:
    """A PNG file of zeros that holds all of its pixels."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row = 1 + -(-width * channels * depth // 8)
    packer = zlib.compressobj(9)
    size = row * height
    data = b"".join([packer.compress(bytes(min(MIB, size - at))) for at in range(0, size, MIB)])
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)),
        *([(b"PLTE", bytes(3 * 256)), (b"tRNS", bytes(256))] if colour == 3 else []),
        (b"IDAT", data + packer.flush()),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def saved(kind: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(kind: str, size: tuple[int, int], **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str, size: tuple[int, int], **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(kind, size, exif=exif, **options)


def frames(kind: str, number: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (1000, 1000), (n % 256, n // 256, 0)) for n in range(number)]
    pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def crowded(number: int) -> bytes:
    """A palette of one picture of noise-like lines, which compresses badly."""
    image = Image.new("RGB", (3000, 3000))
    pen = ImageDraw.Draw(image)
    for n in range(number):
        pen.line((n * 37 % 3000, 0, n * 91 % 3000, 3000), fill=(n % 256, n * 7 % 256, n * 13 % 256))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, progressive=True)
    return buffer.getvalue()


MOST = MEGAPIXELS * 1_000_000
SHAPES: dict[str, Callable[[], bytes]] = {
    "one row": lambda: png(MOST, 1),
    "one column": lambda: png(1, MOST),
    "two rows": lambda: png(MOST // 2, 2),
    "two columns": lambda: png(2, MOST // 2),
    "one row with alpha": lambda: png(MOST, 1, colour=6),
    "one column with alpha": lambda: png(1, MOST, colour=6),
    "one row of grey": lambda: png(MOST, 1, colour=0),
    "one row of 16 bits": lambda: png(MOST, 1, depth=16),
    "one column of 16-bit grey": lambda: png(1, MOST, colour=0, depth=16),
    "square": lambda: png(3162, 3162),
    "square with alpha": lambda: png(3162, 3162, colour=6),
    "square of 16 bits with alpha": lambda: png(3162, 3162, colour=6, depth=16),
    "square of 16-bit grey with alpha": lambda: png(3162, 3162, colour=4, depth=16),
    "square of one bit": lambda: png(3162, 3162, colour=0, depth=1),
    "square with a clear palette": lambda: png(3162, 3162, colour=3),
    "interlaced row": lambda: png(MOST, 1, interlaced=1),
    "interlaced column": lambda: png(1, MOST, interlaced=1),
    "turned PNG": lambda: turned("PNG", (3162, 3162)),
    "turned JPEG": lambda: turned("JPEG", (3162, 3162), quality=50),
    "progressive JPEG": lambda: saved("JPEG", (3162, 3162), progressive=True),
    "progressive JPEG of lines": lambda: crowded(2000),
    "CMYK JPEG": lambda: saved("JPEG", (3162, 3162), mode="CMYK"),
    "JPEG of one row": lambda: saved("JPEG", (65_000, 1)),
    "JPEG of one column": lambda: saved("JPEG", (1, 65_000)),
    "lossless WebP": lambda: gradient("WEBP", (3162, 3162), lossless=True),
    "WebP with alpha": lambda: saved("WEBP", (3162, 3162), mode="RGBA"),
    "WebP of one row": lambda: saved("WEBP", (16_383, 1), lossless=True),
    "animated WebP": lambda: frames("WEBP", 40),
    "animated GIF": lambda: frames("GIF", 40),
    "animated PNG": lambda: frames("PNG", 40),
    "GIF of one row": lambda: saved("GIF", (65_535, 1)),
    "TIFF of one row": lambda: saved("TIFF", (MOST, 1), compression="tiff_adobe_deflate"),
    "TIFF of one column": lambda: saved("TIFF", (1, MOST // 10), compression="tiff_adobe_deflate"),
    "TIFF of LZW": lambda: saved("TIFF", (3162, 3162), compression="tiff_lzw"),
    "TIFF of 16-bit grey": lambda: saved(
        "TIFF", (3162, 3162), mode="I;16", compression="tiff_adobe_deflate"
    ),
    "TIFF of fax": lambda: saved("TIFF", (30_000, 333), mode="1", compression="group4"),
    "BMP of one column": lambda: saved("BMP", (1, 1_000_000)),
}


@pytest.fixture(scope="module")
def frugal(detector, tmp_path_factory) -> Iterator[Service]:
    """A service with a small budget, so that an overrun is cheap."""
    variables = {"GHM_MAX_DECODED_BYTES": str(BUDGET), "MALLOC_ARENA_MAX": "2"}
    folder = tmp_path_factory.mktemp("frugal")
    with serving(detector, folder, "--max-megapixels", MEGAPIXELS, **variables) as running:
        yield running


@pytest.mark.parametrize("make", cases(4, SHAPES))
def test_a_picture_costs_no_more_than_the_budget(frugal, png, make):
    body = make()
    with frugal.grows_at_most(BUDGET + SLACK), Canary(frugal), ThreadPoolExecutor() as pool:
        sent = [
            pool.submit(frugal.ask, "/v1/detect", body, Content_Type="image/png")
            for _ in range(AT_ONCE)
        ]
        statuses = {answer.result(PATIENCE).status for answer in sent}
    assert statuses <= {200, 413, 429}
    frugal.detects(png)
    frugal.lives()


@pytest.mark.parametrize("kind", cases(4, {kind: kind for kind in ("image/png", "image/jpeg")}))
def test_a_drawn_picture_costs_no_more_than_the_budget(frugal, png, kind):
    body = saved("PNG", (3162, 3162))
    with frugal.grows_at_most(BUDGET + SLACK):
        answer = frugal.ask("/v1/detect?format=image", body, Accept=kind)
    assert answer.status in (200, 413, 429)
    frugal.detects(png)


def test_pictures_of_a_list_share_the_budget(frugal, png):
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n'
    body = b"".join(part % saved("PNG", (3162, 3162)) for _ in range(16)) + b"--b--\r\n"
    with frugal.grows_at_most(BUDGET + SLACK):
        answer = frugal.ask("/v1/detect", body, Content_Type="multipart/form-data; boundary=b")
    assert answer.status in (200, 413, 429)
    frugal.detects(png)


def test_too_little_memory_is_not_blamed_on_the_picture(detector, png, tmp_path):
    """Within the budget of images, but beyond a limit of the process."""
    body = saved("PNG", (6300, 6300))
    with serving(detector, tmp_path, MALLOC_ARENA_MAX="1") as service:
        service.detects(png)
        limit = service.memory("VmSize") + 16 * MIB
        resource.prlimit(service.process.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        answer = service.ask("/v1/detect", body, Content_Type="image/png")
        service.detects(png)
    assert answer.status == 503, answer
