"""Kind 2: what is not yet a request, or no longer one, is bounded in bytes, number and time."""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from time import perf_counter

import numpy as np
import pytest
from PIL import Image

from tests.attack.core import (
    MIB,
    Canary,
    Service,
    cases,
    head,
    parse_answers,
    receive_all,
    serving,
    until,
)
from tests.service.conftest import encode_image

LIVE = head(first=b"GET /health/live HTTP/1.1")
CHUNKED = head(b"Transfer-Encoding: chunked")
LAST, ENDED = head(b"Transfer-Encoding: chunked", b"Connection: close"), b"0\r\n\r\n"
MEMORY = 24 * MIB  # that a flood may cost
BLOCK = 64 * 1024
SOON = 20  # seconds in which a connection closes that may last one


def flood(
    start: bytes, piece: bytes, mebibytes: int, end: bytes = b""
) -> Callable[[], Iterator[bytes]]:
    """A start, the same piece over and over in blocks, and an end."""
    block = piece * (BLOCK // len(piece))
    middle = mebibytes * MIB // len(block)
    return lambda: itertools.chain([start], itertools.repeat(block, middle), [end])


FLOODS = {
    "many headers": flood(LIVE[:-2], b"A: b\r\n", 10),
    "many headers of one name": flood(LIVE[:-2], b"Cookie: " + b"c" * 1000 + b"\r\n", 10),
    "one header": flood(LIVE[:-2] + b"A: ", b"b", 10),
    "one name of a header": flood(LIVE[:-2], b"a", 10),
    "folded header": flood(LIVE[:-2] + b"A: b\r\n", b" b\r\n", 10),
    "URL": flood(b"GET /", b"u", 20),
    "URL of escapes": flood(b"GET /", b"%41", 20),
    "query": flood(b"GET /health/live?", b"a=b&", 20),
    "method": flood(b"", b"G", 20),
    "version": flood(b"GET / HTTP/", b"1", 20),
    "trailers": flood(CHUNKED + b"1\r\na\r\n0\r\n", b"A: b\r\n", 15),
    "one trailer": flood(CHUNKED + b"1\r\na\r\n0\r\nA: ", b"b", 15),
    "extension of a chunk": flood(CHUNKED + b"1;", b"a", 15),
    "extensions of chunks": flood(LAST, b"1;" + b"a" * 1000 + b"\r\na\r\n", 30, ENDED),
    "size of a chunk": flood(CHUNKED, b"0", 15),
    "chunks of a byte": flood(LAST, b"1\r\na\r\n", 5, ENDED),
    "body of chunks": flood(CHUNKED, b"8000\r\n" + b"a" * 0x8000 + b"\r\n", 64),
    "body behind a refusal": flood(head(b"Content-Length: 9999999999"), b"a", 64),
    "empty lines": flood(b"", b"\r\n", 15),
    "pipelined requests": flood(b"", LIVE, 6),
    "pipelined bodies": flood(b"", head(b"Content-Length: 1") + b"a", 6),
    "pipelined refusals": flood(b"", b"GET / HTTP/1.1\r\n\r\n", 6),
}


@pytest.mark.parametrize("pieces", cases(2, FLOODS))
def test_a_flood_costs_neither_memory_nor_others_their_time(service, pieces):
    with service.grows_at_most(MEMORY), Canary(service):
        received = service.send(*pieces())
    statuses = [answer.status for answer in parse_answers(received)]
    assert [status for status in statuses[:-1] if status not in (200, 415)] == []
    assert statuses[-1:] == [] or statuses[-1] in (200, 400, 408, 413, 414, 415, 429, 431)
    service.lives()


UNREAD = {
    "pipelined requests": LIVE,
    "pipelined pages": head(first=b"GET /openapi.json HTTP/1.1"),
    "pipelined metrics": head(first=b"GET /metrics HTTP/1.1"),
}


@pytest.mark.parametrize("request_", cases(2, UNREAD))
def test_answers_that_nobody_reads_cost_no_memory(service, request_):
    with service.grows_at_most(MEMORY), Canary(service), service.connect(4096) as connection:
        connection.settimeout(2)
        with suppress(OSError):  # the service stops reading, or ends the connection
            for _ in range(6 * MIB // BLOCK):
                connection.sendall(request_ * (BLOCK // len(request_)))
    service.lives()


# Each holds a connection: what is sent first, and then, over and over, until it is closed.
HOLDS = {
    "nothing": (b"", b""),
    "half a method": (b"G", b""),
    "half a line": (b"GET /health/live HT", b""),
    "half a head": (b"GET /health/live HTTP/1.1\r\nHost: x\r\nA: ", b""),
    "trickle of a URL": (b"GET /", b"u"),
    "trickle of a header": (LIVE[:-2] + b"A: ", b"b"),
    "trickle of headers": (LIVE[:-2], b"A: b\r\n"),
    "trickle of empty lines": (b"", b"\r\n"),
    "silence after an answer": (LIVE, b""),
    "empty lines after an answer": (LIVE, b"\r\n"),
    "half a head after an answer": (LIVE + b"GET /he", b""),
    "trickle of a head after an answer": (LIVE + LIVE[:-2], b"A: b\r\n"),
    "body that does not come": (head(b"Content-Length: 10"), b""),
    "body that expects to continue": (head(b"Content-Length: 10", b"Expect: 100-continue"), b""),
    "trickle of a body": (head(b"Content-Length: 1000000"), b"a"),
    "trickle of chunks": (CHUNKED, b"1\r\na\r\n"),
    "trickle of an extension": (CHUNKED + b"1;", b"a"),
    "trickle of trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"A: b\r\n"),
    "trickle of a body behind a 404": (
        head(b"Content-Length: 1000000", first=b"POST /nil HTTP/1.1"),
        b"a",
    ),
    "trickle of a body behind a 405": (
        head(b"Content-Length: 1000000", first=b"POST /v1/models HTTP/1.1"),
        b"a",
    ),
    "trickle of a body behind a 413": (head(b"Content-Length: 99999999999"), b"a"),
    "trickle of a body of a GET": (
        head(b"Content-Length: 1000000", first=b"GET /health/live HTTP/1.1"),
        b"a",
    ),
    "trickle behind Connection: close": (
        LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
        b"a",
    ),
    "trickle behind a refusal": (b"GET / HTTP/1.1\r\n\r\n", b"a"),
}


def hold(service: Service, first: bytes, again: bytes) -> bool:
    """Send again and again; whether the service closes the connection soon."""
    with service.connect() as connection:
        connection.settimeout(0.1)
        started = perf_counter()
        with suppress(ConnectionError):
            connection.sendall(first)
            while perf_counter() - started < SOON:
                try:
                    if not connection.recv(BLOCK):
                        return True
                except TimeoutError:
                    connection.sendall(again)
            return False
    return True  # by a reset


@pytest.fixture(scope="module")
def closed(impatient) -> dict[str, bool]:
    """All at once, since each takes its time."""
    impatient.lives()  # so that it has opened what it needs
    before = impatient.descriptors()
    with ThreadPoolExecutor(len(HOLDS)) as pool:
        ends = pool.map(lambda shape: hold(impatient, *shape), HOLDS.values())
        results = dict(zip(HOLDS, ends, strict=True))
    return results | {"nothing is left": until(lambda: impatient.descriptors() <= before)}


@pytest.mark.parametrize("name", cases(2, {name: name for name in [*HOLDS, "nothing is left"]}))
def test_nobody_holds_a_connection(closed, impatient, name):
    assert closed[name]
    impatient.lives()


CROWDS = {
    "idle connections": (b"", 200),
    "half heads": (b"GET / HT", 503),
    "half bodies": (head(b"Content-Length: 10") + b"a", 503),
    "connections kept alive": (LIVE, 200),
}


@pytest.fixture(scope="module")
def narrow(detector, tmp_path_factory) -> Iterator[Service]:
    """A service that may open 64 files."""
    limited = ("sh", "-c", 'ulimit -n 64; exec "$@"', "sh")
    folder = tmp_path_factory.mktemp("narrow")
    variables = {"GHM_HEADER_SECONDS": "1", "GHM_RECEIVE_SECONDS": "1"}
    with serving(detector, folder, prefix=limited, **variables) as running:
        yield running


@pytest.mark.parametrize(("data", "status"), cases(2, CROWDS))
def test_a_crowd_of_connections_shuts_nobody_out_for_long(narrow, data, status):
    with ExitStack() as stack:
        crowd = [stack.enter_context(narrow.connect()) for _ in range(80)]
        for connection in crowd:
            with suppress(ConnectionError):
                connection.sendall(data)
        started = perf_counter()
        statuses = []
        while statuses[-1:] != [200] and perf_counter() - started < SOON:
            with suppress(OSError):
                statuses.append(narrow.ask("/health/live").status)
        assert statuses[-1:] == [200]
        assert set(statuses) <= {status, 200}
    narrow.lives()


def test_pictures_that_nobody_reads_are_not_kept(detector, png, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    picture = encode_image(Image.fromarray(noise), "JPEG", quality=50)
    ask = head(b"Content-Length: %d" % len(picture), first=b"POST /v1/detect?format=image HTTP/1.1")
    with serving(detector, tmp_path, GHM_WRITE_SECONDS="1") as service, ExitStack() as stack:
        crowd = [stack.enter_context(service.connect(4096)) for _ in range(4)]
        for connection in crowd:
            connection.sendall(ask + picture)
        given_up = 'reason="slow_reader"} 4.0'
        until(lambda: given_up in service.ask("/metrics").body.decode())
        for connection in crowd:
            assert len(receive_all(connection)) < 7 * MIB  # not all of it
        service.detects(png)
