import gzip
import random
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http import encodings
from service.http.encodings import Inflater, compress

CODINGS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}


def inflate(coding: str, compressed: bytes, limit: int = 2**20, step: int = 1000) -> bytes:
    inflater = Inflater(coding, limit)
    for start in range(0, len(compressed), step):
        inflater.feed(compressed[start : start + step])
    return inflater.finish()


@given(st.sampled_from(sorted(CODINGS)), st.binary(max_size=3000), st.integers(1, 500))
def test_inflates_however_it_arrives(coding, content, step):
    assert inflate(coding, CODINGS[coding](content), step=step) == content


@pytest.mark.parametrize("size", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_inflates_what_ends_at_the_edge_of_a_slice(size):
    content = random.Random(0).randbytes(100) * (size // 100) + bytes(size % 100)
    assert inflate("gzip", gzip.compress(content), 2**24, 2**24) == content


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_the_limit_is_of_inflated_bytes_and_exact(coding, refused):
    compressed = CODINGS[coding](bytes(5000))
    assert inflate(coding, compressed, 5000) == bytes(5000)
    assert "4999 bytes" in refused(413, inflate, coding, compressed, 4999)


def test_a_bomb_is_not_inflated(refused):
    bomb = gzip.compress(bytes(200 * 2**20), 6)
    tracemalloc.start()
    detail = refused(413, inflate, "gzip", bomb, 2**30, 2**16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "256-fold" in detail
    # 8 MiB are let through, and the buffer doubles as it grows; 200 MiB would be inflated.
    assert peak < 32 * 2**20


def test_pictures_that_shrink_well_are_no_bombs():
    noise = random.Random(0).randbytes(2**16)
    letterboxed = (noise + bytes(7 * 2**18)) * 5  # 9 MiB, 28 parts of grey to one of picture
    assert inflate("deflate", zlib.compress(letterboxed), 2**24, 2**16) == letterboxed
    black = bytes(encodings._FREE_BYTES)
    assert inflate("gzip", gzip.compress(black), 2**24, 2**16) == black


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda whole: whole[:-1], "too early"),
        (lambda whole: whole[:-8], "too early"),
        (lambda whole: whole[:0], "too early"),
        (lambda whole: whole + b"x", "follow the end"),
        (lambda whole: whole * 2, "follow the end"),
        (lambda whole: whole[1:], "header"),
        (lambda whole: whole[:-8] + bytes(8), "check"),
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_damaged_bodies(damage, why, step, refused):
    detail = refused(400, inflate, "gzip", damage(gzip.compress(b"content")), 100, step)
    assert detail.startswith("Content-Encoding is gzip")
    assert why in detail


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("GZip;Q=0.5", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("gzip; q=0", None),
        ("*", "gzip"),
        ("gzip;q=0, *", None),
        ("gzip;q=much", None),
        ("gzip;q=nan", None),
        (",;,=;q=", None),
    ],
)
def test_answers_are_compressed_as_the_client_takes_them(accepted, coding):
    body = b"content " * 1000
    sent, used = compress(body, accepted)
    assert used == coding
    if coding is None:
        assert sent is body
    else:
        assert len(sent) < len(body) / 10
        undo = gzip.decompress if coding == "gzip" else zlib.decompress
        assert undo(sent) == body


def test_short_answers_are_not_compressed():
    assert compress(b"x" * 1023, "gzip") == (b"x" * 1023, None)
    assert compress(b"x" * 1024, "gzip")[1] == "gzip"
