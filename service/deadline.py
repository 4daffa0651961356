"""Work for a request ends when its answer is of no more use: too late, or nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.problems import ProblemError

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
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait(
            (doing, leaving), timeout=milliseconds / 1000, return_when=asyncio.FIRST_COMPLETED
        )
        if doing in done:
            return doing.result()
        if leaving in done:
            raise ClientDisconnect
        raise ProblemError(504, f"the answer was not ready within {milliseconds:g} ms")
    finally:
        leaving.cancel()
        doing.cancel()  # does nothing where it is done


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
