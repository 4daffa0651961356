import asyncio
import gzip
import random
import tracemalloc
import zlib
from types import SimpleNamespace

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import ProblemError
from service.http import bodies
from service.http.bodies import BodyLimitMiddleware, Inflater, compress, read_body

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
    black = bytes(bodies._FREE_BYTES)
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


def ask(chunks: list[bytes], headers: dict[str, str], limit: int = 1000) -> bytes:
    """The body that `read_body` reads from a request that comes in these chunks."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    taken.clear()

    async def receive():
        taken.append(messages[len(taken)])
        return taken[-1]

    async def elsewhere(function, *arguments):
        return await asyncio.to_thread(function, *arguments)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
    return asyncio.run(read_body(request, limit, elsewhere))


taken: list[dict] = []


def test_reads_plain_bodies():
    assert ask([b"ab", b"", b"c"], {}) == b"abc"
    assert ask([b"abc"], {"content-encoding": "identity"}) == b"abc"
    assert ask([b"x" * 1000], {"content-length": "1000"}) == b"x" * 1000


@pytest.mark.parametrize("name", ["gzip", "GZIP", " gzip ", "x-gzip", "deflate", "identity, gzip"])
def test_reads_compressed_bodies(name):
    coding = name.lower().rpartition(",")[2].strip()
    whole = CODINGS[coding](b"content")
    assert ask([whole[:5], whole[5:]], {"content-encoding": name}) == b"content"


@pytest.mark.parametrize("name", ["br", "gzip, deflate", "gzip, gzip", "zstd", "x"])
def test_other_codings_are_refused_and_ours_are_named(name):
    with pytest.raises(ProblemError) as caught:
        ask([b"x"], {"content-encoding": name})
    assert caught.value.status == 415
    assert repr(name) in caught.value.detail
    assert caught.value.headers == {"Accept-Encoding": "gzip, deflate"}
    assert taken == []


def test_too_much_is_refused_before_it_is_read_where_it_is_promised():
    with pytest.raises(ProblemError) as caught:
        ask([b"x" * 1001], {"content-length": "1001"})
    assert caught.value.status == 413
    assert taken == []


@pytest.mark.parametrize("headers", [{}, {"content-length": "5"}, {"content-length": "-1"}])
def test_too_much_is_refused_as_it_comes_where_it_is_not(headers):
    with pytest.raises(ProblemError) as caught:
        ask([b"x" * 500] * 10, headers)
    assert caught.value.status == 413
    assert len(taken) == 3


def test_compressed_bytes_that_stand_for_nothing_are_counted_too():
    blocks = b"\x78\x01" + b"\x00\x00\x00\xff\xff" * 1000  # stored blocks of no bytes
    with pytest.raises(ProblemError) as caught:
        ask([blocks[at : at + 100] for at in range(0, 5000, 100)], {"content-encoding": "deflate"})
    assert caught.value.status == 413
    assert len(taken) == 11


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


# The bound on bytes and time of bodies that arrive.


class Sender:
    """A client that sends a body in pieces, the last only when `finish` is set."""

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)
        self.finish = asyncio.Event()

    async def receive(self):
        if len(self.pieces) > 1:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": True}
        await self.finish.wait()
        if self.pieces:
            return {"type": "http.request", "body": self.pieces.pop(), "more_body": False}
        return {"type": "http.disconnect"}


async def read_all(scope, receive, send):
    body = await read_body(Request(scope, receive), 10**6, asyncio.to_thread)
    await send({"type": "body", "body": body})


def limited(app=read_all, max_bytes=100, seconds=60.0):
    refused = []
    metrics = SimpleNamespace(rejected=refused.append)
    return BodyLimitMiddleware(app, max_bytes, seconds, metrics), refused


async def send_to(middleware, sender, *, finished=True, headers=()) -> bytes:
    sent = []

    async def send(message):
        sent.append(message["body"])

    if finished:
        sender.finish.set()
    scope = {"type": "http", "method": "POST", "headers": list(headers)}
    await middleware(scope, sender.receive, send)
    return sent[0]


def run(check):
    asyncio.run(asyncio.wait_for(check(), 30))


def test_all_bodies_together_are_bounded_and_a_body_alone_is_not():
    async def check():
        middleware, refused = limited()
        for _ in range(2):  # forgotten afterwards
            assert len(await send_to(middleware, Sender(b"x" * 90, b"y" * 90))) == 180
        slow = Sender(b"x" * 60, b"end")
        waiting = asyncio.create_task(send_to(middleware, slow, finished=False))
        await asyncio.sleep(0)
        with pytest.raises(ProblemError, match="60 bytes of bodies are held") as error:
            await send_to(middleware, Sender(b"y" * 41, b"end"))
        assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
        assert (refused, middleware.held) == (["bodies"], 60)
        assert await send_to(middleware, Sender(b"y" * 40)) == b"y" * 40
        slow.finish.set()
        assert await waiting == b"x" * 60 + b"end"
        assert middleware.held == 0

    run(check)


def test_inflated_bytes_count_too():
    async def check():
        middleware, refused = limited()
        slow = asyncio.create_task(send_to(middleware, Sender(b"x", b"end"), finished=False))
        await asyncio.sleep(0)
        small = gzip.compress(b"y" * 500)
        with pytest.raises(ProblemError, match="at most 100"):
            await send_to(middleware, Sender(small), headers=[(b"content-encoding", b"gzip")])
        assert (refused, middleware.held) == (["bodies"], 1)
        slow.cancel()
        await asyncio.wait([slow])
        assert middleware.held == 0

    run(check)


def test_a_body_that_does_not_arrive_is_408():
    async def check():
        middleware, refused = limited(seconds=0.01)
        with pytest.raises(ProblemError, match=r"within 0\.01 s") as error:
            await send_to(middleware, Sender(b"x", b"never"), finished=False)
        assert error.value.status == 408
        assert (refused, middleware.held) == (["slow_body"], 0)

    run(check)


def test_the_time_ends_with_the_body():
    """Waiting for the client to disconnect is not waiting for its body."""

    async def wait_for_the_end(scope, receive, send):
        await Request(scope, receive).body()
        message = await receive()
        await send({"type": "body", "body": message["type"].encode()})

    async def check():
        middleware, _ = limited(wait_for_the_end, seconds=0.05)
        sender = Sender(b"x")
        gone, receive = asyncio.Event(), sender.receive

        async def disconnect_late():
            if not sender.pieces:
                await gone.wait()
            return await receive()

        sender.receive = disconnect_late
        asyncio.get_running_loop().call_later(0.1, gone.set)
        assert await send_to(middleware, sender) == b"http.disconnect"

    run(check)
