"""Several worker processes at one address, kept running by uvicorn's supervisor.

uvicorn starts the workers as fresh interpreters that share the listening socket, replaces those
that die, and stops all of them. Added here, because uvicorn lacks it:

- the parent reports a start once all workers answer, and fails with the reason if one cannot start;
- a replacement that cannot start is tried again, where uvicorn would stop the others too;
- a worker whose event loop has not run for `heartbeat_seconds` is killed and replaced;
- counters of a worker that died are kept (`WorkerFiles.retire`);
- workers stop with their parent, however it ends, and are killed if they do not stop in time;
- the listening socket is closed before the workers stop, so that no connection waits in vain;
- Ctrl+C while a worker is still importing is no traceback.

uvicorn's pings are not used: a worker on a busy machine may take longer to import than they allow,
and a thread of its own answers them, whatever the event loop does.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Pipe, wait
from time import monotonic, sleep
from typing import NoReturn

import uvicorn
from uvicorn.supervisors import multiprocess

from service.core import worker_files
from service.core.settings import Settings, SettingsError
from service.core.signals import handle_further_signals
from service.observability import logs

logger = logging.getLogger("ghm.workers")

_CANNOT_START = 2
_RETRY_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # beyond the drain and shutdown times, before a worker is killed


class _Config(uvicorn.Config):
    """The configuration that uvicorn passes to each worker.

    Attributes:
        settings: The service's settings.
        announced: Whether all workers have started once.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__("service.app:create_app", workers=settings.workers, log_config=None)
        self.settings = settings
        self.announced = False


class _Worker(multiprocess.Process):
    """One worker process, seen from the parent and, in `target`, from the child."""

    config: _Config

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        self._reports, self._report = Pipe(duplex=False)
        self._alive_at = get_context("spawn").Value("d", math.inf, lock=False)
        super().__init__(config, sockets)

    def start(self) -> None:
        """Start the process, which ignores Ctrl+C until its server handles it."""
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            super().start()
        finally:
            signal.signal(signal.SIGINT, handler)

    def started(self, seconds: float) -> str | None:
        """Wait for the start of the process.

        Returns:
            The text to print; None if the process has not started in time.

        Raises:
            SettingsError: It cannot start.
        """
        wait([self._reports, self.process.sentinel], seconds)
        if self._reports.poll():
            success, text = self._reports.recv()
            if not success:
                raise SettingsError(text)
            return str(text)
        if self.exitcode is not None:
            raise SettingsError(f"a worker ended with status {self.exitcode} before it had started")
        return None

    def is_alive(self, timeout: float = 5) -> bool:  # noqa: ARG002  uvicorn's
        """Whether the process runs, and its event loop ran lately."""
        seconds = monotonic() - self._alive_at.value
        if self.process.is_alive() and seconds > self.config.settings.heartbeat_seconds:
            logger.error("worker %d gives no sign of life for %.0f s", self.pid, seconds)
            self.process.kill()
        return self.process.is_alive()

    def join(self) -> None:
        """Wait for the end of the process, and keep its counters."""
        settings = self.config.settings
        self.process.join(settings.drain_seconds + settings.shutdown_seconds + _GRACE_SECONDS)
        if self.exitcode is None:
            logger.error("worker %d does not stop; killing it", self.pid)
            self.process.kill()
            self.process.join()
        level = logging.ERROR if self.exitcode else logging.INFO
        logger.log(level, "worker %d ended with status %d", self.pid, self.exitcode)
        files = worker_files.WorkerFiles.of_environment()
        if files and self.pid:
            files.retire(self.pid)

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, in the child."""
        from service.server import DrainingServer, banner, prepare  # of no use in the parent

        settings = self.config.settings
        logs.configure(settings.log_level, settings.log_format)
        limit = settings.drain_seconds + settings.shutdown_seconds + _GRACE_SECONDS
        threading.Thread(target=_stop_with_parent, args=(limit,), daemon=True).start()
        try:
            app = prepare(settings)
        except SettingsError as error:
            self._give_up(str(error))
        text = banner(app)
        DrainingServer(
            app, settings, lambda: self._report.send((True, text)), self._give_sign_of_life
        ).run(sockets)

    def _give_sign_of_life(self) -> None:
        self._alive_at.value = monotonic()

    def _give_up(self, problem: str) -> NoReturn:
        self._report.send((False, problem))
        if self.config.announced:
            logger.error("a worker cannot start: %s", problem)
            sleep(_RETRY_SECONDS)  # the parent starts another at once
        sys.exit(_CANNOT_START)


class Supervisor(multiprocess.Multiprocess):
    """Keeps `settings.workers` processes answering at a socket until SIGTERM or Ctrl+C.

    Args:
        settings: Settings of each worker.
        listener: A listening socket.
        announce: Called with the first worker's banner once all of them answer.
    """

    processes: list[_Worker]  # type: ignore[assignment]

    def __init__(
        self, settings: Settings, listener: socket.socket, announce: Callable[[str], None]
    ) -> None:
        multiprocess.Process = _Worker  # type: ignore[misc]  # uvicorn has no other hook for it
        self._config = _Config(settings)
        super().__init__(self._config, [listener])
        handle_further_signals(lambda _: self.signal_queue.append(signal.SIGTERM))
        self._announce = announce

    def run(self) -> None:
        """Start the workers, and return when they have stopped.

        Raises:
            SettingsError: A worker could not start.
        """
        with worker_files.shared_folder() as folder:
            os.environ[worker_files.VARIABLE] = folder
            try:
                super().run()
            finally:
                for worker in self.processes:
                    worker.process.kill()
                    worker.process.join()

    def init_processes(self) -> None:
        """Start the workers and wait until all of them answer, or a signal arrives."""
        super().init_processes()
        texts: list[str] = []
        while len(texts) < len(self.processes) and not self.signal_queue:
            text = self.processes[len(texts)].started(seconds=0.5)
            texts += [] if text is None else [text]
        if len(texts) == len(self.processes):
            self._config.announced = True
            self._announce(texts[0])

    def keep_subprocess_alive(self) -> None:
        """Replace workers that have ended; one that cannot be started is tried again."""
        try:
            super().keep_subprocess_alive()
        except OSError as error:  # no more files, processes or memory
            logger.error("a worker cannot be started: %s", error)

    def terminate_all(self) -> None:
        """Stop all workers. A further signal is passed on; a second one ends their drain."""
        for listener in self.sockets:
            listener.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: super(Supervisor, self).terminate_all())
        super().terminate_all()


def _stop_with_parent(limit: float) -> None:
    """Stop as at SIGTERM when the parent ends; after so many seconds at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        sleep(limit)
        os._exit(1)
