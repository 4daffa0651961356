"""One serving process: load the models, and stop without losing a request."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from types import FrameType

import uvicorn
from fastapi import FastAPI

from export.card import CardError
from service.api.state import ServiceState
from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.core.signals import handle_further_signals
from service.engine.catalogue import CatalogueError
from service.engine.session import ModelError
from service.http.protocol import BoundedProtocol, ConnectionLimits, check_connections

logger = logging.getLogger("ghm.service")

# A request allocates hundreds of objects, nearly all of which reference counting frees.
_OBJECTS_BETWEEN_COLLECTIONS = 20_000

# For models that are loaded again, log files and the like.
_RESERVED_DESCRIPTORS = 16

_GRACE_SECONDS = 5.0  # beyond the shutdown time, before threads that do not end are left

_CLOSE = (b"connection", b"close")


def prepare(settings: Settings) -> FastAPI:
    """Create the application and warm up its models, before anything listens.

    Returns:
        The application, with at least one model ready.

    Raises:
        SettingsError: No model can be served, or a setting is invalid; one sentence.
    """
    _check_certificate(settings)
    try:
        app = create_app(settings)
        asyncio.run(_load(app.state.service))
    except (CardError, CatalogueError, ModelError) as error:
        raise SettingsError(str(error)) from error
    except OSError as error:
        named = error.filename and error.strerror
        reason = f"{error.filename}: {error.strerror}" if named else str(error)
        raise SettingsError(reason) from error
    gc.collect()
    gc.freeze()  # so that collections skip the objects that live as long as the process
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 10, 10)
    return app


def _check_certificate(settings: Settings) -> None:
    if settings.ssl_certfile is None:
        if settings.ssl_keyfile is not None:
            raise SettingsError("ssl_keyfile is set, and ssl_certfile is not")
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, lambda: "")
    except OSError as error:  # of which ssl's are
        key = f" with {settings.ssl_keyfile}" if settings.ssl_keyfile else ""
        raise SettingsError(f"ssl_certfile {settings.ssl_certfile}{key}: {error}") from error


async def _load(service: ServiceState) -> None:
    await service.registry.load()
    await service.registry.warm_up()
    if not any(entry.ready for entry in service.registry.entries()):
        raise ModelError("; ".join(service.registry.problems()))


def banner(app: FastAPI) -> str:
    """Return the text printed at the start: each model's thresholds and execution provider."""
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
    """A uvicorn server that drains before it stops, and then returns.

    At SIGTERM `/health/ready` answers 503 and connections are closed after each answer, so that
    clients reconnect elsewhere. `drain_seconds` later the server stops accepting connections, and
    requests in progress have `shutdown_seconds` to end. A second signal ends the drain. Ctrl+C
    skips it, and a second Ctrl+C drops requests in progress.

    Args:
        app: The application.
        settings: Provides `drain_seconds` and `shutdown_seconds`.
        on_started: Called once requests are answered.
        on_alive: Called about once a second while the event loop runs.
    """

    def __init__(
        self,
        app: FastAPI,
        settings: Settings,
        on_started: Callable[[], None] | None = None,
        on_alive: Callable[[], None] | None = None,
    ) -> None:
        service: ServiceState = app.state.service
        self._limits = _limits(settings)
        config = uvicorn.Config(
            app,
            http=partial(  # type: ignore[arg-type]  # called as the class would be
                BoundedProtocol, limits=self._limits, count=service.metrics.rejected
            ),
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            timeout_keep_alive=math.ceil(settings.keep_alive_seconds),
            log_config=None,  # done by service.observability.logs
            access_log=False,  # service.http.access logs more
            ws="none",
            proxy_headers=False,  # done by service.http.middleware
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds),
        )
        super().__init__(config)
        self._service = service
        self._settings = settings
        self._on_started = on_started
        self._on_alive = on_alive
        self._closes_at: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start answering requests."""
        await super().startup(sockets)
        if self._on_started:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving: SIGHUP and SIGQUIT stop as SIGTERM does."""
        with super().capture_signals():
            if threading.current_thread() is threading.main_thread():
                handle_further_signals(lambda number: self.handle_exit(number, None))
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  uvicorn's
        """Handle a signal by setting flags, since it may arrive between any two instructions.

        uvicorn's handler also raises the signal again after the shutdown, so that the exit status
        would be that of a killed process.
        """
        if sig == signal.SIGINT and self.should_exit:
            self.force_exit = True
        if self._closes_at is not None or sig == signal.SIGINT:
            self.should_exit = True
        self._drain()

    def _drain(self) -> None:
        self._service.draining = True
        self._closes_at = self._closes_at or monotonic() + self._settings.drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, or end the process if that takes too long."""
        limit = _end_process_in(self._settings.shutdown_seconds + _GRACE_SECONDS)
        await super().shutdown(sockets)
        limit.cancel()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until stopped. The process ends soon after, whatever threads do not end."""
        super().run(sockets)
        _end_process_in(_GRACE_SECONDS)

    async def on_tick(self, counter: int) -> bool:
        """Check the connections, and stop when the drain is over. Called ten times a second."""
        if counter % 10 == 0:
            if self._on_alive:
                self._on_alive()
            if self._service.scheduler.stuck and self._settings.workers > 1:
                self._drain()  # the worker is replaced
            now = asyncio.get_running_loop().time()
            check_connections(self.server_state.connections, now, self._limits)
        if self._closes_at is not None:
            if _CLOSE not in self.config.encoded_headers:
                logger.info(
                    "stopping: not ready from now on, closing in %g s", self._settings.drain_seconds
                )
                self.config.encoded_headers.append(_CLOSE)
                self.server_state.default_headers.append(_CLOSE)
            if monotonic() >= self._closes_at:
                self.should_exit = True
        return await super().on_tick(counter)


def _end_process_in(seconds: float) -> threading.Timer:
    """End the process after some time, without waiting for its threads."""

    def end() -> None:
        logger.error("work does not end; leaving it")
        logging.shutdown()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        header_bytes=settings.max_header_bytes,
        header_seconds=settings.header_seconds,
        write_seconds=settings.write_seconds,
        connections=min(settings.max_connections, _free_descriptors()),
    )


def _free_descriptors() -> int:
    """Return how many connections fit beside the files that are open, with a reserve."""
    try:
        import resource

        used = sum(1 for _ in Path("/dev/fd").iterdir())
    except (ImportError, OSError):  # Windows, or no such folder
        return sys.maxsize
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    return max(1, limit - used - _RESERVED_DESCRIPTORS)
