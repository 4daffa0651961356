"""One process that serves: loads the models, listens, and stops without losing a request."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from export.card import CardError
from service.api.state import ServiceState
from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.engine.catalogue import CatalogueError
from service.engine.session import ModelError

logger = logging.getLogger("ghm.service")

# A request makes hundreds, nearly all of which go by themselves.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000

_CLOSE = (b"connection", b"close")


def prepare(settings: Settings) -> FastAPI:
    """Make the application and let its models answer once, before anything listens.

    Returns:
        The application, with at least one model that is ready.

    Raises:
        SettingsError: There is none, or a setting cannot be; in a sentence.
    """
    try:
        app = create_app(settings)
        asyncio.run(_load(app.state.service))
        _settle()
    except (CardError, CatalogueError, ModelError) as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        named = error.filename and error.strerror
        reason = f"{error.filename}: {error.strerror}" if named else str(error)
        raise SettingsError(reason) from error
    return app


def _settle() -> None:
    """Spare the garbage collector from looking, again and again, at what lives for ever."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)


async def _load(service: ServiceState) -> None:
    await service.registry.load()
    await service.registry.warm_up()
    if not any(entry.ready for entry in service.registry.entries()):
        raise ModelError("; ".join(service.registry.problems()))


def banner(app: FastAPI) -> str:
    """What a start prints: the thresholds of each model, and what runs it."""
    service: ServiceState = app.state.service
    lines = []
    for entry in service.registry.entries():
        if entry.model is None:
            continue
        card = entry.model.card
        name = entry.name if entry.listed.name is None else f"{entry.name} {entry.version}"
        lines.append(card.threshold_table())
        threads = service.settings.threads
        lines.append(f"{name} runs on {entry.model.providers[0]}, threads: {threads}")
    return "\n".join(lines)


class DrainingServer(uvicorn.Server):
    """Stops in good order, and then returns.

    At SIGTERM `/health/ready` begins to say 503, and connections are closed after each answer, so
    that clients come back elsewhere. `drain_seconds` later nothing new is accepted, and what is in
    work has `shutdown_seconds` to end. A second signal ends the drain at once; so does Ctrl+C,
    which people press who do not want to wait, and a second Ctrl+C drops what is in work.

    Args:
        app: The application.
        settings: Its `drain_seconds` and `shutdown_seconds`.
        on_started: Called once requests are answered.
    """

    def __init__(
        self, app: FastAPI, settings: Settings, on_started: Callable[[], None] | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,  # service.observability.logs has set it up
            access_log=False,  # service.access has a line that says more
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
        )
        super().__init__(config)
        self._service: ServiceState = app.state.service
        self._drain_seconds = settings.drain_seconds
        self._on_started = on_started
        self._closes_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        if self._on_started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's
        """Take a signal. Runs between any two instructions, so it only sets flags.

        Uvicorn's own keeps the signal and raises it again in the end: a process that was stopped in
        good order would look as if it had been killed.
        """
        if sig == signal.SIGINT and self.should_exit:
            self.force_exit = True
        if self._closes_at is not None or sig == signal.SIGINT:
            self.should_exit = True
        self._service.draining = True
        self._closes_at = self._closes_at or monotonic() + self._drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: see whether it is time to stop."""
        if self._closes_at is not None:
            if _CLOSE not in self.config.encoded_headers:
                logger.info("stopping: not ready from now on, closing in %g s", self._drain_seconds)
                self.config.encoded_headers.append(_CLOSE)
                self.server_state.default_headers.append(_CLOSE)
            if monotonic() >= self._closes_at:
                self.should_exit = True
        return await super().on_tick(counter)
