"""A budget of bytes that requests share, served in the order of arrival."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from service.core.errors import ProblemError


class ByteBudget:
    """Bytes that may be in use at a time. Only the event loop may call its methods.

    First come, first served: small demands do not overtake a large one, so it is met in the end.

    Args:
        total: The size of the budget.

    Attributes:
        total: The size of the budget.
        free: Bytes that are not in use.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def use(self, amount: int) -> AsyncIterator[None]:
        """Wait until `amount` bytes are free, and hold them within the context.

        Raises:
            ProblemError: 413 if the budget is smaller than that.
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
        entry = (amount, turn)
        self._waiting.append(entry)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # served in the same moment
                self.free += amount
            with suppress(ValueError):
                self._waiting.remove(entry)
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self.free:
            amount, turn = self._waiting.popleft()
            if not turn.done():
                self.free -= amount
                turn.set_result(None)
