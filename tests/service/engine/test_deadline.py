import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request

from service.core.errors import ProblemError
from service.engine.deadline import while_wanted


class Peer:
    """The other end of a request whose body has been read."""

    def __init__(self):
        self.left = asyncio.Event()
        self.request = Request({"type": "http", "headers": []}, self.receive)

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Lasts for ever, and knows whether it was stopped."""

    stopped = False

    async def do(self):
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped = True


def run(check):
    asyncio.run(asyncio.wait_for(check(), 30))


def test_the_result_of_the_work():
    async def check():
        peer = Peer()

        async def seven():
            await asyncio.sleep(0)
            return 7

        assert await while_wanted(peer.request, seven(), 60_000) == 7
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that bounds it

    run(check)


def test_the_error_of_the_work():
    async def check():
        async def fail():
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            await while_wanted(Peer().request, fail(), 60_000)

    run(check)


def test_past_the_deadline_it_is_504_and_the_work_stops():
    async def check():
        work = Work()
        with pytest.raises(ProblemError, match=r"within 1\.5 ms") as late:
            await while_wanted(Peer().request, work.do(), 1.5)
        assert late.value.status == 504
        await asyncio.sleep(0)
        assert work.stopped

    run(check)


def test_a_client_that_leaves_ends_the_work():
    async def check():
        peer, work = Peer(), Work()
        waiting = asyncio.create_task(while_wanted(peer.request, work.do(), 60_000))
        await asyncio.sleep(0)
        peer.left.set()
        with pytest.raises(ClientDisconnect):
            await waiting
        await asyncio.sleep(0)
        assert work.stopped

    run(check)


def test_cancelling_the_request_stops_the_work():
    async def check():
        peer, work = Peer(), Work()
        waiting = asyncio.create_task(while_wanted(peer.request, work.do(), 60_000))
        for _ in range(3):
            await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0)
        assert work.stopped

    run(check)
