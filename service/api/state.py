"""What one running service holds, and how its routes get at it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import Request

from service.core.budget import ByteBudget
from service.core.settings import Settings
from service.engine.batching import Scheduler
from service.engine.repository import Registry
from service.observability.metrics import Metrics


@dataclass
class ServiceState:
    """The settings, the models, and who runs them.

    Attributes:
        settings: What the service was told.
        registry: The models.
        scheduler: Runs them.
        decoded: The bytes that decoded images may take, all requests together.
        metrics: Counts what happens.
        draining: Whether the service is about to stop: it still answers, and says that it is not
            ready so that no more requests are sent to it.
    """

    settings: Settings
    registry: Registry = field(init=False)
    scheduler: Scheduler = field(init=False)
    decoded: ByteBudget = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    _background: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        told = self.settings
        self.registry = Registry(
            told.source,
            provider=told.provider,
            threads=told.threads,
            spin=told.inferences == 1,
            observer=self.metrics,
        )
        self.scheduler = Scheduler(told, self.metrics)
        self.decoded = ByteBudget(told.max_decoded_bytes)

    async def start(self) -> None:
        """Load what is not loaded. Warm up beside the first requests, so that health answers.

        Raises:
            CardError, ModelError, OSError, CatalogueError: As `Registry.load`.
        """
        if not self.registry.entries():
            await self.registry.load()
        self._background = [asyncio.create_task(self._warm_up_and_watch())]

    async def stop(self) -> None:
        """End what runs in the background."""
        for task in self._background:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self.scheduler.close()

    async def _warm_up_and_watch(self) -> None:
        await self.registry.warm_up()
        if self.settings.reload_seconds:
            await self.registry.watch(self.settings.reload_seconds)


def service_state(request: Request) -> ServiceState:
    """The state of the service that a request came to."""
    state = request.app.state.service
    if not isinstance(state, ServiceState):
        raise TypeError(f"app.state.service must be a ServiceState, got {type(state).__name__}")
    return state
