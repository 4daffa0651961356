"""The state of one running service, its memory budget, and access to both from a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import Request
from starlette.convertors import StringConvertor, register_url_convertor

from service.core.errors import ProblemError
from service.core.settings import Settings
from service.engine.batching import Scheduler, stuck_reason
from service.engine.repository import Entry, Registry
from service.observability.metrics import Metrics


class _NameConvertor(StringConvertor):
    regex = r"[\s\S]+"


# A model's name in a route, which may contain slashes and newlines. Routes that end with it must
# follow those with a longer path.
register_url_convertor("model", _NameConvertor())
MODEL = "{name:model}"


class ByteBudget:
    """Bytes that may be in use at a time, for the tasks of one event loop.

    First come, first served: small demands do not overtake a large one, so it is met in the end.

    Attributes:
        total: The size of the budget.
        free: Bytes that are not in use.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = total
        self._turn = asyncio.Lock()  # its holder is the next to be served
        self._freed = asyncio.Event()

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
        async with self._turn:
            while amount > self.free:
                self._freed.clear()
                await self._freed.wait()
            self.free -= amount
        try:
            yield
        finally:
            self.free += amount
            self._freed.set()


class ServiceState:
    """The models, the scheduler that runs them, and what they share.

    Attributes:
        decoded: Budget for the bytes of decoded images, over all requests.
        draining: Whether the service is about to stop: it still answers, but is not ready, so that
            no more requests are sent to it.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.registry = Registry(settings, self.metrics)
        self.scheduler = Scheduler(settings, self.metrics)
        self.decoded = ByteBudget(settings.max_decoded_bytes)
        self.draining = False
        self._background: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the models. They warm up beside the first requests, so that health answers.

        Raises:
            CardError, ModelError, OSError, CatalogueError: As `Registry.load`.
        """
        if not self.registry.entries():
            await self.registry.load()
        self._background = asyncio.create_task(self._warm_up_and_watch())

    async def stop(self) -> None:
        """End the background work."""
        if self._background is not None:
            self._background.cancel()
            with suppress(asyncio.CancelledError):
                await self._background
        self.scheduler.close()

    async def _warm_up_and_watch(self) -> None:
        await self.registry.warm_up()
        if self.settings.reload_seconds:
            await self.registry.watch(self.settings.reload_seconds)

    def check_ready(self) -> list[Entry]:
        """Return the entries of all models if the service is ready.

        Raises:
            ProblemError: 503 while it stops, before its models have answered once, or if an
                inference does not end.
        """
        if self.draining:
            raise ProblemError(503, "not ready: the service is stopping", {"Retry-After": "1"})
        for model in self.scheduler.stuck:
            raise ProblemError(503, f"not ready: {stuck_reason(model)}", {"Retry-After": "5"})
        return self.registry.check_ready()

    async def reload(self, name: str) -> list[Entry]:
        """Read every version of a model again and return its entries.

        Raises:
            ProblemError: 403 if requests may not control models, 404 if there is no such model, 409
                if a file cannot be served.
        """
        allowed = self.settings.model_control
        if not (self.settings.has_tokens if allowed is None else allowed):
            raise ProblemError(
                403, "model control is off; --model-control or GHM_MODEL_CONTROL=1 allows it"
            )
        entries = await self.registry.reload(name)
        problems = [f"{entry.path.name}: {entry.problem}" for entry in entries if entry.problem]
        if problems:
            raise ProblemError(409, "; ".join(problems))
        return entries


def service_state(request: Request) -> ServiceState:
    """Return the state of the service that received a request."""
    state = request.app.state.service
    if not isinstance(state, ServiceState):
        raise TypeError(f"app.state.service must be a ServiceState, got {type(state).__name__}")
    return state
