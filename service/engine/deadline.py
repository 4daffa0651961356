"""Cancel the work of a request when its answer is of no more use."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from service.core.errors import ProblemError

T = TypeVar("T")


async def while_wanted(request: Request, work: Coroutine[Any, Any, T], milliseconds: float) -> T:
    """Do the work of a request until the client disconnects or the time is up.

    The work runs in the caller's task, since another task would cost as much as the watch for the
    client.

    Args:
        request: The request. Its body must have been read to the end, so that the next message is
            the disconnection.
        work: Cancelled when its result is of no more use.
        milliseconds: Time limit.

    Returns:
        The result of the work.

    Raises:
        ProblemError: 504 when the time is up.
        ClientDisconnect: The client has disconnected.
    """
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("no task is running")
    gone = False

    def on_disconnect(leaving: asyncio.Future[None]) -> None:
        nonlocal gone
        if not leaving.cancelled():
            gone = True
            task.cancel()

    watch = asyncio.ensure_future(_disconnected(request))
    watch.add_done_callback(on_disconnect)
    limit = asyncio.timeout(milliseconds / 1000)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():  # raised by the work
            raise
        raise ProblemError(504, f"the answer was not ready within {milliseconds:g} ms") from error
    except asyncio.CancelledError:
        if not gone:  # cancelled from outside
            raise
        task.uncancel()
        raise ClientDisconnect from None
    finally:
        watch.remove_done_callback(on_disconnect)
        watch.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
