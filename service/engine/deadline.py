"""Work for a request ends when its answer is of no more use: too late, or nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.core.errors import ProblemError

T = TypeVar("T")


async def while_wanted(request: Request, work: Coroutine[Any, Any, T], milliseconds: float) -> T:
    """Do the work of a request, unless the client goes away or the time is up.

    Args:
        request: Its body must have been read to the end: what arrives after it is only the news
            that the client is gone.
        work: Cancelled when it is of no more use.
        milliseconds: How long it may take.

    Returns:
        What the work returns.

    Raises:
        ProblemError: 504 when the time is up.
        ClientDisconnect: Nobody waits for the answer any more.
    """
    watch = _Watch(request)
    limit = asyncio.timeout(milliseconds / 1000)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():  # the work's own
            raise
        raise ProblemError(504, f"the answer was not ready within {milliseconds:g} ms") from error
    except asyncio.CancelledError:
        if not watch.gone:  # somebody else's wish
            raise
        watch.working.uncancel()
        raise ClientDisconnect from None
    finally:
        watch.end()


class _Watch:
    """Cancels the task that makes it as soon as the client has gone.

    The work stays in the task of its request: one task more would cost as much as this.
    """

    def __init__(self, request: Request) -> None:
        working = asyncio.current_task()
        if working is None:
            raise RuntimeError("no task is running")
        self.working = working
        self.gone = False
        self._leaving = asyncio.ensure_future(_gone(request))
        self._leaving.add_done_callback(self._left)

    def _left(self, leaving: asyncio.Future[None]) -> None:
        if not leaving.cancelled():
            self.gone = True
            self.working.cancel()

    def end(self) -> None:
        """Look no more."""
        self._leaving.remove_done_callback(self._left)
        self._leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
