"""Several processes at one address: started, watched, replaced, and stopped together.

The parent listens, and answers nothing itself. Its workers are fresh interpreters that inherit the
listening socket, so that a connection waits for whichever worker is free, and none is lost with a
worker that dies before it was accepted. Parent and worker hold the two ends of a socket: the worker
says over it when it answers, or why it cannot, and each sees the other's end by its closing.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

from pydantic import SecretStr

from service.core import worker_files as shared
from service.core.settings import PREFIX, Settings, SettingsError, load_settings
from service.observability import logs

logger = logging.getLogger("ghm.workers")

# A worker that ends sooner than this after its start is started again later and later, in seconds.
_HEALTHY = 10.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0

# What workers get beyond the seconds that they were promised before they are killed.
_GRACE = 5.0

_STOPS = (signal.SIGTERM, signal.SIGINT)
_CANNOT_START = 2


@dataclass
class _Worker:
    """One place among the workers, and who fills it.

    Attributes:
        process: None between the end of one and the start of the next.
        ends: The parent's end of the socket, while there is a process.
        said: What it has said so far.
        ready: Whether it answers.
        started_at: When it was started.
        starts_at: When the next is to be started.
        wait: Seconds to wait if it ends soon.
    """

    process: subprocess.Popen[bytes] | None = None
    ends: socket.socket | None = None
    said: bytes = b""
    ready: bool = False
    started_at: float = 0.0
    starts_at: float = 0.0
    wait: float = field(default=_FIRST_WAIT)


class Supervisor:
    """Keeps `settings.workers` processes answering at a socket until it is told to stop.

    Args:
        settings: What each worker is told.
        listener: A socket that listens.
        announce: Told what the first worker printed once all of them answer.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, announce: Callable[[str], None]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._announce = announce
        self._workers = [_Worker() for _ in range(settings.workers)]
        self._selector = selectors.DefaultSelector()
        self._announced = False
        self._kills_at: float | None = None
        self._stops = 0

    def run(self) -> None:
        """Start the workers, and return when they have stopped after SIGTERM or Ctrl+C.

        Raises:
            SettingsError: A worker could not start, before all had once; it has said why.
        """
        with TemporaryDirectory(prefix="ghm-") as folder, self._signals():
            self._files = shared.WorkerFiles(Path(folder))
            try:
                while self._kills_at is None or any(one.process for one in self._workers):
                    self._start_due()
                    for key, _ in self._selector.select(self._pause()):
                        key.data()
                    self._kill_late()
            finally:
                for worker in self._workers:
                    if worker.process:
                        worker.process.kill()
                        worker.process.wait()
                self._selector.close()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Let signals to stop arrive as bytes that the selector sees."""
        hears, tells = socket.socketpair()
        for end in (hears, tells):
            end.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in _STOPS}
        wakeup = signal.set_wakeup_fd(tells.fileno())
        self._selector.register(hears, selectors.EVENT_READ, lambda: self._stop(hears.recv(64)))
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            hears.close()
            tells.close()

    def _stop(self, numbers: bytes) -> None:
        """Pass a signal on. After the second Ctrl+C, nobody waits any longer."""
        if not set(numbers) & {int(number) for number in _STOPS}:
            return
        self._stops += 1
        self._listener.close()  # so that nobody is let in once the workers have closed theirs
        patience = self._settings.drain_seconds + self._settings.shutdown_seconds + _GRACE
        hurry = self._stops > 1 and int(signal.SIGINT) in numbers
        self._kills_at = monotonic() + (0 if hurry else patience)
        pressed = int(signal.SIGINT) in numbers
        for worker in self._workers:
            if worker.process:  # one that does not answer yet has nothing to end in good order
                gently = signal.SIGINT if pressed and worker.ready else signal.SIGTERM
                worker.process.send_signal(gently)

    def _start_due(self) -> None:
        for worker in self._workers:
            due = worker.process is None and monotonic() >= worker.starts_at
            if due and self._kills_at is None:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        ours, theirs = socket.socketpair()
        descriptors = (self._listener.fileno(), theirs.fileno())
        # -P: a folder that happens to be called `service` where this runs must not be imported.
        command = [sys.executable, "-P", "-m", __name__, *map(str, descriptors)]
        environment = {**os.environ, **environment_of(self._settings)}
        environment[shared.VARIABLE] = str(self._files.folder)
        with theirs:
            worker.process = subprocess.Popen(  # noqa: S603  this interpreter, this module
                command,
                env=environment,
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl+C is for the parent, which passes it on
            )
        ours.setblocking(False)
        worker.ends, worker.said, worker.ready = ours, b"", False
        worker.started_at = monotonic()
        self._selector.register(ours, selectors.EVENT_READ, lambda: self._hear(worker))
        logger.info("worker %d started", worker.process.pid)

    def _hear(self, worker: _Worker) -> None:
        """A worker has said something, or ended."""
        if worker.ends is None:
            return
        try:
            said = worker.ends.recv(65536)
        except ConnectionError:
            said = b""
        worker.said += said
        if not said:
            self._ended(worker)
        elif worker.said.endswith(b"\n"):
            self._understood(worker, json.loads(worker.said))

    def _understood(self, worker: _Worker, message: dict[str, str]) -> None:
        worker.ready = "ready" in message
        if not worker.ready:
            if not self._announced:
                raise SettingsError(message["problem"])
            logger.error("a worker cannot start: %s", message["problem"])
        elif not self._announced and all(one.ready for one in self._workers):
            self._announced = True
            self._announce(message["ready"])

    def _ended(self, worker: _Worker) -> None:
        if worker.process is None or worker.ends is None:
            return
        self._selector.unregister(worker.ends)
        worker.ends.close()
        try:
            status = worker.process.wait(_GRACE)
        except subprocess.TimeoutExpired:  # it has closed its end, and goes on
            worker.process.kill()
            status = worker.process.wait()
        pid, worker.process, worker.ends = worker.process.pid, None, None
        self._files.retire(pid)
        if self._kills_at is not None:
            return
        if not self._announced:
            raise SettingsError(f"a worker ended with status {status} before it had started")
        soon = not worker.ready or monotonic() - worker.started_at < _HEALTHY
        wait = worker.wait if soon else 0.0
        worker.wait = min(2 * worker.wait, _LONGEST_WAIT) if soon else _FIRST_WAIT
        worker.starts_at = monotonic() + wait
        logger.error("worker %d ended with status %d; another starts in %g s", pid, status, wait)

    def _pause(self) -> float | None:
        """Seconds until something is to be done even if nothing happens."""
        moments = [one.starts_at for one in self._workers if one.process is None]
        if self._kills_at is not None:
            moments = [self._kills_at]
        return max(0.0, min(moments) - monotonic()) if moments else None

    def _kill_late(self) -> None:
        if self._kills_at is None or monotonic() < self._kills_at:
            return
        for worker in self._workers:
            if worker.process:
                logger.error("worker %d does not stop; killing it", worker.process.pid)
                worker.process.kill()
        self._kills_at = monotonic() + _GRACE


def environment_of(settings: Settings) -> dict[str, str]:
    """Settings as the environment variables that `load_settings` reads them from."""
    return {f"{PREFIX}{name.upper()}": _text(value) for name, value in settings}


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return "" if value is None else str(value)


def main(arguments: list[str]) -> int:
    """Be a worker.

    Args:
        arguments: The descriptors of the listening socket and of the socket to the parent.

    Returns:
        0 after a normal stop, 2 where the service could not start.
    """
    from service.server import DrainingServer, banner, prepare

    listener, parent = (socket.socket(fileno=int(number)) for number in arguments)
    settings = load_settings()
    logs.configure(settings.log_level, settings.log_format)
    try:
        app = prepare(settings)
    except SettingsError as error:
        _say(parent, problem=str(error))
        return _CANNOT_START
    threading.Thread(target=_stop_with, args=(parent,), daemon=True).start()
    text = banner(app)
    server = DrainingServer(app, settings, on_started=lambda: _say(parent, ready=text))
    server.run(sockets=[listener])
    return 0


def _say(parent: socket.socket, **message: str) -> None:
    with suppress(OSError):  # the parent has gone; `_stop_with` sees that too
        parent.sendall(json.dumps(message).encode() + b"\n")


def _stop_with(parent: socket.socket) -> None:
    """Stop in good order when the parent has ended, however it did."""
    with suppress(OSError):
        parent.recv(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
