"""A budget that requests share: whoever finds it spent waits, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from service.core.errors import ProblemError


class ByteBudget:
    """Bytes that may be in use at a time. Its methods belong to the event loop.

    First come, first served: a large demand is not overtaken by small ones, so it is met in the
    end.

    Args:
        total: The bytes there are.

    Attributes:
        total: The bytes there are.
        free: Those that nobody uses.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def use(self, amount: int) -> AsyncIterator[None]:
        """Wait until so many bytes are free, and have them.

        Args:
            amount: Bytes.

        Raises:
            ProblemError: 413 where there will never be so many.
        """
        if amount > self.total:
            raise ProblemError(
                413, f"decoding takes {amount} bytes; at most {self.total} are there for images"
            )
        await self._acquire(amount)
        try:
            yield
        finally:
            self.free += amount
            self._serve()

    async def _acquire(self, amount: int) -> None:
        if not self._waiting and amount <= self.free:
            self.free -= amount
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (amount, turn)
        self._waiting.append(place)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was served in the same moment
                self.free += amount
            with suppress(ValueError):
                self._waiting.remove(place)
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            amount, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= amount
                turn.set_result(None)
