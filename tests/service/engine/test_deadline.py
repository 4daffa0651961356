import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request

from service.core.errors import ProblemError
from service.engine.deadline import while_wanted


class Peer:
    """The other end of a request whose body has been read, and its work."""

    def __init__(self):
        self.left = asyncio.Event()
        self.request = Request({"type": "http", "headers": []}, self.receive)
        self.stopped = False

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def endless(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


@pytest.fixture
def run():
    """Runs a coroutine function with a peer, and bounds its time."""

    def start(check):
        async def with_peer():
            await check(Peer())

        asyncio.run(asyncio.wait_for(with_peer(), 30))

    return start


def test_the_result_of_the_work(run):
    async def check(peer):
        assert await while_wanted(peer.request, asyncio.sleep(0, 7), 60_000) == 7
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that bounds it

    run(check)


@pytest.mark.parametrize("error", [ValueError, TimeoutError])
def test_an_error_of_the_work(run, error):
    async def check(peer):
        async def fail():
            raise error("mine")

        with pytest.raises(error, match="mine"):
            await while_wanted(peer.request, fail(), 60_000)

    run(check)


def test_past_the_deadline_it_is_504_and_the_work_stops(run):
    async def check(peer):
        with pytest.raises(ProblemError, match=r"within 1\.5 ms") as late:
            await while_wanted(peer.request, peer.endless(), 1.5)
        assert late.value.status == 504
        assert peer.stopped

    run(check)


@pytest.mark.parametrize("end", ["disconnect", "cancel"])
def test_a_disconnect_and_a_cancellation_stop_the_work(run, end):
    async def check(peer):
        waiting = asyncio.create_task(while_wanted(peer.request, peer.endless(), 60_000))
        for _ in range(3):
            await asyncio.sleep(0)
        peer.left.set() if end == "disconnect" else waiting.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert waiting.done()  # at once, and not only when the test is cancelled
        with pytest.raises(ClientDisconnect if end == "disconnect" else asyncio.CancelledError):
            await waiting
        assert peer.stopped

    run(check)
