"""Connections, over real sockets: what is refused, in which order, and what is bounded."""

import asyncio
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.server import ServerState

from service.http.protocol import BoundedProtocol, ConnectionLimits, check_connections

GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\n"
HOST = b"Host: x\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"


GO, GONE = Event(), Event()


SLOW_BEGAN, SLOW_MAY_END = Event(), Event()


class Server(uvicorn.Server):
    """A server of `app` in a thread, whose connections are checked as the service's are."""

    def __init__(self, app, limits: ConnectionLimits, keep_alive: int) -> None:
        self.limits = limits
        self.reasons: list[str] = []
        http = partial(BoundedProtocol, limits=limits, count=self.reasons.append)
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                log_config=None,
                lifespan="off",
                port=0,
                timeout_keep_alive=keep_alive,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        now = asyncio.get_running_loop().time()
        check_connections(self.server_state.connections, now, self.limits)
        return await super().on_tick(counter)

    def exchange(self, *pieces: bytes, end: bool = True) -> bytes:
        """Send pieces, and return all that comes back until the server closes."""
        with self.connect() as connection:
            for piece in pieces:
                connection.sendall(piece)
            if end:
                connection.sendall(b"GET /end HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return read(connection)

    def connect(self) -> socket.socket:
        address = self.servers[0].sockets[0].getsockname()
        return socket.create_connection(address, timeout=20)


def read(connection: socket.socket) -> bytes:
    return b"".join(iter(partial(connection.recv, 65536), b""))


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", answer)]


async def echo(scope, receive, send) -> None:
    """Answer with method, path, and the body's length; `/early` does not read the body."""
    request = Request(scope, receive)
    while request.url.path == "/wait" and not GO.is_set():
        await asyncio.sleep(0.001)
    if request.url.path == "/gone":
        await request.body()
        while (await receive())["type"] != "http.disconnect":
            pass
        GONE.set()
    size = 0 if request.url.path == "/early" else len(await request.body())
    if request.url.path == "/slow":
        SLOW_BEGAN.set()
        await asyncio.to_thread(SLOW_MAY_END.wait, 20)
    answer = f"<{request.method} {request.url.path} {size}>"
    if request.url.path == "/large":
        answer = "x" * 40_000_000
    await Response(answer)(scope, receive, send)


@contextmanager
def serving(keep_alive: int = 60, **limits) -> Iterator[Server]:
    server = Server(echo, ConnectionLimits(**limits), keep_alive)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        if not thread.is_alive():
            pytest.fail("the server did not start")
    try:
        yield server
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(keep_alive=1, header_bytes=2000) as running:
        yield running


@pytest.mark.parametrize("body", [b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n", b"12345", b""])
def test_an_upgrade_is_ignored(server, body):
    head = POST + OFFER + b"Content-Length: %d\r\n\r\n" % len(body)
    answers = re.findall(rb"<[^>]*>", server.exchange(head + body, GET))
    assert answers == [b"<POST /a %d>" % len(body), b"<GET /a 0>", b"<GET /end 0>"]


def test_an_upgrade_of_a_chunked_request_in_pieces_is_ignored(server):
    head = POST + OFFER + CHUNKED + b"\r\n"
    data = head + b"3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n"
    answer = server.exchange(*(data[start : start + 7] for start in range(0, len(data), 7)))
    assert re.findall(rb"<[^>]*>", answer) == [b"<POST /a 3>", b"<GET /end 0>"]


REFUSED = {
    "two hosts": (b"GET / HTTP/1.1\r\n" + HOST + HOST + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "RTSP": (b"GET / RTSP/1.0\r\n" + HOST + b"\r\n", 505),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", 405),
    "gzip": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunked twice": (POST + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n", 400),
    "length and chunked": (POST + b"Content-Length: 3\r\n" + CHUNKED + b"\r\n", 400),
    "two lengths": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "many headers": (POST + b"A: b\r\n" * 100 + b"\r\n", 431),
    "long header": (POST + b"A: " + b"b" * 2000 + b"\r\n\r\n", 431),
    "header without end": (POST + b"A: " + b"b" * 2000, 431),
    "long URL": (b"GET /" + b"b" * 2000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414),
    "URL without end": (b"GET /" + b"b" * 2000, 414),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
}


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_refused_heads(server, data, status):
    further = GET if data.endswith(b"\r\n") else b""
    answer = server.exchange(data, further, end=False)
    assert statuses(answer) == [status]
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer


@pytest.mark.parametrize(("data", "status"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_comes_after_the_answers_of_earlier_requests(server, data, status):
    answer = server.exchange(GET + GET + data, end=False)
    assert statuses(answer) in ([200, 200, status], [200, 200])


def test_a_malformed_body_is_refused(server):
    head = POST + CHUNKED + b"\r\n"
    assert statuses(server.exchange(head, b"no size\r\n", GET, end=False)) == [400]


def test_trailers_are_bounded_and_no_headers(server):
    head = POST + CHUNKED + b"\r\n3\r\nabc\r\n0\r\n"
    assert statuses(server.exchange(head, b"A: " + b"b" * 600_000, end=False)) == [431]


def test_pipelined_requests_are_bounded_and_those_accepted_are_answered(server):
    answer = server.exchange(GET * 1000, end=False)
    assert set(statuses(answer)) <= {200, 429}
    assert 1 <= statuses(answer).count(200) < 1000
    assert server.reasons[-1] == "pipelined"


def test_an_answer_before_the_body_ends_the_connection_without_a_reset(server):
    head = b"POST /early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"x" * 100_000)
        answer = read(connection)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    ("sent", "status"), [(b"", []), (b"GET / HTTP/1.1\r\nHo", [408]), (b"\r\n\r\n", [408])]
)
def test_a_late_head_ends_the_connection(sent, status):
    with serving(header_seconds=0.3) as server:
        assert statuses(server.exchange(sent, end=False)) == status
        with server.connect() as connection:  # likewise after a request
            connection.sendall(GET)
            assert statuses(connection.recv(65536)) == [200]
            connection.sendall(sent or b"G")
            assert statuses(read(connection)) == [408]


def test_a_client_that_reads_nothing_is_disconnected():
    with serving(write_seconds=0.3) as server:
        with server.connect() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            while "slow_reader" not in server.reasons:
                pass
            assert len(read(connection)) < 40_000_000
        assert statuses(server.exchange(GET)) == [200, 200]


@pytest.mark.parametrize(("rate", "dropped"), [(0, True), (1000, True), (2000, False)])
def test_a_client_must_read_a_kilobyte_per_second(rate, dropped):
    reasons = []
    state, config = ServerState(), uvicorn.Config(echo, log_config=None)
    with closing(asyncio.new_event_loop()) as loop:
        limits = ConnectionLimits(write_seconds=10, header_seconds=100)
        connection = BoundedProtocol(config, state, {}, loop, limits=limits, count=reasons.append)
        start = loop.time()
        for second in range(25):
            unsent = 10**6 - rate * second
            connection.transport = SimpleNamespace(
                get_write_buffer_size=lambda unsent=unsent: unsent, abort=lambda: None
            )
            if not reasons:
                connection.check(start + second)
    assert reasons == ["slow_reader"] * dropped


def test_answers_that_wait_are_bounded_together():
    with serving(unsent_bytes=100_000_000) as server:
        with ExitStack() as stack:
            for _ in range(4):  # 40 MB each, less what the sockets hold
                connection = stack.enter_context(server.connect())
                connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            while len(server.reasons) < 2:
                connection.recv(1, socket.MSG_PEEK)
            assert server.reasons == ["slow_reader"] * 2
        with server.connect() as connection:
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert len(read(connection)) > 40_000_000


def test_beyond_the_limit_the_connection_that_is_idle_longest_is_closed():
    with serving(connections=2) as server:
        first, second = server.connect(), server.connect()
        for connection in (first, second):
            connection.sendall(GET)
            assert statuses(connection.recv(65536)) == [200]
        assert statuses(server.exchange(GET)) == [200, 200]
        assert first.recv(1) == b""
        second.sendall(GET)
        assert statuses(second.recv(65536)) == [200]
        first.close()
        second.close()


def test_a_connection_is_refused_if_none_is_idle():
    with serving(connections=1) as server, server.connect() as busy:
        busy.sendall(POST + b"Content-Length: 1\r\n\r\n")
        # The answer proves that the request had begun, or the connection would have been idle.
        answer = b""
        while statuses(answer) != [503]:
            answer = server.exchange(end=False)
        busy.sendall(b"1")
        assert statuses(busy.recv(65536)) == [200]


def test_a_client_that_ends_its_side_is_answered(server):
    GO.clear()
    with server.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)  # the server has noticed
        GO.set()
        assert statuses(answer + read(connection)) == [100, 200]
    with server.connect() as connection:
        connection.sendall(GET * 3)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(read(connection).replace(CONTINUE, b"")) == [200, 200, 200]


def test_a_client_that_is_gone_is_noticed(server):
    GONE.clear()
    with server.connect() as connection:
        connection.sendall(b"GET /gone HTTP/1.1\r\nHost: x\r\n\r\n")
    assert GONE.wait(20)


def test_refused_connections_take_few_descriptors():
    with serving(connections=1) as server, ExitStack() as stack:
        stack.enter_context(server.connect()).sendall(POST + b"Content-Length: 1\r\n\r\n")
        while "connections" not in server.reasons:  # until the request has begun
            server.exchange(end=False)
        crowd = [stack.enter_context(server.connect()) for _ in range(50)]
        for connection in crowd:
            connection.setblocking(True)
            with suppress(ConnectionError):
                connection.recv(1)
        assert len(server.server_state.connections) < 20


def test_a_lost_connection_ends_the_request_that_runs_before_pipelined_ones(caplog):
    with serving() as server:
        with server.connect() as connection:
            connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n" + GET)
            SLOW_BEGAN.wait(20)
            reset = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        while server.server_state.connections:
            pass
        SLOW_MAY_END.set()
        while server.server_state.tasks:
            pass
        assert statuses(server.exchange(GET)) == [200, 200]
    assert "Traceback" not in caplog.text
    assert "the handler is closed" not in caplog.text
