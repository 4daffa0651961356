import asyncio

import pytest
from starlette.requests import Request

from service.core.errors import ProblemError
from service.http.reception import ReceptionMiddleware, hold


class Watcher:
    def __init__(self):
        self.refused = []

    def rejected(self, reason):
        self.refused.append(reason)


class Sender:
    """A client that sends a body in pieces, the last of them only when it is told to."""

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)
        self.finishes = asyncio.Event()

    async def receive(self):
        if len(self.pieces) > 1:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": True}
        await self.finishes.wait()
        if self.pieces:
            return {"type": "http.request", "body": self.pieces.pop(), "more_body": False}
        return {"type": "http.disconnect"}


async def read_all(scope, receive, send):
    await send({"type": "body", "body": await Request(scope, receive).body()})


def reception(app=read_all, max_bytes=100, seconds=60.0):
    watcher = Watcher()
    return ReceptionMiddleware(app, max_bytes, seconds, watcher), watcher


async def ask(middleware, sender) -> bytes:
    sent = []

    async def send(message):
        sent.append(message["body"])

    await middleware({"type": "http", "headers": []}, sender.receive, send)
    return sent[0]


def run(check):
    asyncio.run(asyncio.wait_for(check(), 30))


def test_bodies_pass_and_are_forgotten_afterwards():
    async def check():
        middleware, _ = reception()
        for _ in range(3):
            sender = Sender(b"x" * 60, b"y" * 30)
            sender.finishes.set()
            assert await ask(middleware, sender) == b"x" * 60 + b"y" * 30
        assert middleware.held == 0

    run(check)


def test_together_they_may_not_hold_too_much():
    async def check():
        middleware, watcher = reception()
        slow = Sender(b"x" * 60, b"end")
        waiting = asyncio.create_task(ask(middleware, slow))
        await asyncio.sleep(0)
        assert middleware.held == 60
        other = Sender(b"y" * 41, b"end")
        with pytest.raises(ProblemError, match="60 bytes of bodies are held") as refused:
            await ask(middleware, other)
        assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "1"})
        assert watcher.refused == ["bodies"]
        assert middleware.held == 60
        fits = Sender(b"y" * 40)
        fits.finishes.set()
        assert await ask(middleware, fits) == b"y" * 40
        slow.finishes.set()
        assert await waiting == b"x" * 60 + b"end"
        assert middleware.held == 0

    run(check)


def test_one_alone_may_be_larger_than_all_together():
    async def check():
        middleware, _ = reception()
        large = Sender(b"x" * 90, b"y" * 90)
        large.finishes.set()
        assert len(await ask(middleware, large)) == 180

    run(check)


def test_what_a_body_inflates_to_counts_too():
    async def inflate(scope, receive, send):
        request = Request(scope, receive)
        await request.body()
        hold(request, 1000)
        await send({"type": "body", "body": b""})

    async def check():
        middleware, _ = reception(inflate)
        slow = asyncio.create_task(ask(middleware, Sender(b"x", b"end")))
        await asyncio.sleep(0)
        other = Sender(b"y")
        other.finishes.set()
        with pytest.raises(ProblemError, match="at most 100"):
            await ask(middleware, other)
        slow.cancel()
        await asyncio.wait([slow])
        assert middleware.held == 0

    run(check)


def test_a_body_that_does_not_come_is_408():
    async def check():
        middleware, watcher = reception(seconds=0.01)
        with pytest.raises(ProblemError, match=r"within 0\.01 s") as late:
            await ask(middleware, Sender(b"x", b"never"))
        assert late.value.status == 408
        assert watcher.refused == ["slow_body"]
        assert middleware.held == 0

    run(check)


def test_waiting_for_the_client_to_leave_is_not_waiting_for_its_body():
    async def wait_for_the_end(scope, receive, send):
        await Request(scope, receive).body()
        message = await receive()
        await send({"type": "body", "body": message["type"].encode()})

    async def check():
        middleware, _ = reception(wait_for_the_end, seconds=0.05)
        sender = Sender(b"x")
        sender.finishes.set()
        gone = asyncio.Event()
        receive = sender.receive

        async def slowly():
            if not sender.pieces:
                await gone.wait()
            return await receive()

        sender.receive = slowly
        asyncio.get_running_loop().call_later(0.1, gone.set)  # later than a body may be
        assert await ask(middleware, sender) == b"http.disconnect"

    run(check)


def test_what_is_no_request_passes_through():
    async def check():
        seen = []

        async def app(scope, receive, send):
            seen.append(scope)

        await reception(app)[0]({"type": "lifespan"}, None, None)
        assert seen == [{"type": "lifespan"}]

    run(check)
