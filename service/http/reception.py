"""Bodies as they come in: how many bytes of them are held at a time, and for how long one waits.

A queue bounds the images that are worked on; this bounds those that are not there yet. Without it,
a thousand clients that each send all but the last byte of a body would hold a thousand bodies.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import ProblemError

_KEY = "held_bytes"


class RefusalObserver(Protocol):
    """Whoever wants to know of refusals: the metrics."""

    def rejected(self, reason: str) -> None:
        """A request was refused."""


class _Held:
    """The bytes that one request holds of what all may hold together."""

    def __init__(self, reception: ReceptionMiddleware) -> None:
        self._reception = reception
        self.amount = 0

    def take(self, amount: int) -> None:
        """Hold more.

        Raises:
            ProblemError: 429 where all together hold too much. One request alone never does.
        """
        together = self._reception.held
        if self.amount < together and together + amount > self._reception.max_bytes:
            self._reception.observer.rejected("bodies")
            raise ProblemError(
                429,
                f"busy: {together} bytes of bodies are held, and at most"
                f" {self._reception.max_bytes} may be",
                {"Retry-After": "1"},
            )
        self.amount += amount
        self._reception.held += amount


class ReceptionMiddleware:
    """Bounds the bytes of all bodies together, and the time that each may take to arrive.

    Args:
        app: What answers.
        max_bytes: Of all bodies that are held at a time.
        seconds: From a request's headers to the end of its body.
        observer: Told of refusals.
    """

    def __init__(
        self, app: ASGIApp, max_bytes: int, seconds: float, observer: RefusalObserver
    ) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self.observer = observer
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = scope.setdefault("state", {})[_KEY] = _Held(self)
        end = asyncio.get_running_loop().time() + self.seconds
        arrived = False

        async def receive_in_time() -> Message:
            nonlocal arrived
            if arrived:  # what comes now is only the news that the client has gone
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError:
                self.observer.rejected("slow_body")
                raise ProblemError(
                    408, f"the body did not arrive within {self.seconds:g} s"
                ) from None
            arrived = not message.get("more_body", False)
            held.take(len(message.get("body", b"")))
            return message

        try:
            await self.app(scope, receive_in_time, send)
        finally:
            self.held -= held.amount


def hold(request: HTTPConnection, amount: int) -> None:
    """Count bytes that a request holds beyond those that it received: what it inflates to.

    Raises:
        ProblemError: 429 where all requests together hold too much.
    """
    held = request.scope.get("state", {}).get(_KEY)
    if held is not None:
        held.take(amount)
