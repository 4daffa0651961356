"""Real `ghm serve` processes under attack, raw connections, and what is checked of them."""

import io
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from ghm_triton.cli import main; sys.exit(main())"]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GHM_")}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "HOME": "/proc/nowhere"}
PATIENCE = 60  # seconds that a loaded machine may take for anything; only failures wait so long
MIB = 2**20
_SLOWER = 1000  # times that an answer may take longer under attack

END = b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def cases(kind: int, table: dict[str, Any], broken: Iterable[str] = ()) -> list[Any]:
    """Return the shapes of a table as parameters; those that fail today are marked so.

    Args:
        kind: The kind of attack, as docs/security.md numbers them.
        table: Shapes by name.
        broken: Names of those that are not held yet.
    """
    unknown = set(broken) - set(table)
    if unknown:
        raise ValueError(f"broken names no shape: {sorted(unknown)}")
    return [
        pytest.param(*(shape if isinstance(shape, tuple) else (shape,)), id=name)
        if name not in broken
        else pytest.param(
            *(shape if isinstance(shape, tuple) else (shape,)), id=name, marks=fails(kind, name)
        )
        for name, shape in table.items()
    ]


def fails(kind: int, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=f"kind {kind}: {reason}")


@dataclass(frozen=True)
class Answer:
    """One parsed HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def parse_answers(received: bytes, method: str = "GET") -> list[Answer]:
    """Parse what came back over one connection: complete answers, and nothing between them."""
    stream = io.BufferedReader(io.BytesIO(received))
    stream.close, close = lambda: None, stream.close  # `HTTPResponse` closes it after an answer
    answers = []
    while stream.peek(1):
        reader = HTTPResponse(_Readable(stream), method=method)
        reader.begin()
        body = reader.read()
        headers = {name.lower(): value for name, value in reader.getheaders()}
        answers.append(Answer(reader.status, headers, body))
    close()
    return answers


class _Readable:
    def __init__(self, stream: io.BufferedReader) -> None:
        self.makefile = lambda *_: stream


class Service:
    """A running `ghm serve`.

    Attributes:
        process: The process that was started.
        port: The port that it listens at; 0 if it ended before it listened.
    """

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self._log = log
        self._examined = 0
        killer = threading.Timer(PATIENCE, process.kill)
        killer.start()
        lines = iter(process.stdout)
        serving = next((line for line in lines if line.startswith("serving")), "")
        killer.cancel()
        self.port = int(serving.rpartition(":")[2]) if serving else 0
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def send(self, *pieces: bytes, half_close: bool = False) -> bytes:
        """Send pieces over one connection; return what came back until it was closed."""
        with self.connect() as connection:
            sender = threading.Thread(target=_send_all, args=(connection, pieces, half_close))
            sender.start()
            received = receive_all(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            sender.join()
        return received

    def exchange(self, *pieces: bytes, method: str = "GET") -> list[Answer]:
        """Send pieces over one connection; return the answers."""
        return parse_answers(self.send(*pieces), method)

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        method: str | None = None,
        seconds: float = PATIENCE,
        **headers: str,
    ) -> Answer:
        """Send one honest request; underscores in names of headers are hyphens."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
            answer = connection.getresponse()
            read = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, read, answer.read())
        finally:
            connection.close()

    def live(self) -> float:
        """Seconds that `/health/live` takes."""
        started = perf_counter()
        assert self.ask("/health/live").status == 200
        return perf_counter() - started

    def detects(self, png: bytes) -> None:
        """An honest request is answered."""
        answer = self.ask("/v1/detect", png, Content_Type="image/png")
        assert answer.status == 200, answer.body
        assert len(answer.json()["detections"]) == 3

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def pids(self) -> list[int]:
        """The process and its descendants."""
        found, queue = [], [self.process.pid]
        while queue:
            pid = queue.pop()
            found.append(pid)
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    queue += map(int, (task / "children").read_text().split())
        return found

    def memory(self, key: str = "VmRSS") -> int:
        """Bytes of all processes together: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
        return sum(_status(pid, key) for pid in self.pids()) * 1024

    def forget_peak(self) -> int:
        """Reset the peak; return the bytes in use now."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self.memory()

    @contextmanager
    def grows_at_most(self, size: int) -> Iterator[None]:
        """The memory in use rises by no more than `size` bytes, not even for a moment."""
        before = self.forget_peak()
        yield
        grown = self.memory("VmHWM") - before
        assert grown <= size, f"{grown / MIB:.0f} MiB more, at most {size / MIB:.0f} allowed"

    def descriptors(self) -> int:
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids())

    def ends(self, status: int = 0) -> None:
        """The process ends with a status, and leaves no traceback."""
        assert self.process.wait(PATIENCE) == status, self.log()[-2000:]
        assert "Traceback" not in self.log()

    def lives(self) -> None:
        """The process runs and answers, and no error was unexpected."""
        assert self.process.poll() is None, self.log()[-2000:]
        assert self.ask("/health/ready").status == 200
        log, before = self.log(), self._examined
        self._examined = len(log)  # so that one traceback fails one test
        raised = [line[-1500:] for line in log[before:].splitlines() if "Traceback" in line]
        assert not raised, raised[0]


def _status(pid: int, key: str) -> int:
    with suppress(OSError):
        found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)
        if found:
            return int(found[1])
    return 0


def _send_all(connection: socket.socket, pieces: Iterable[bytes], half_close: bool) -> None:
    with suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
        if half_close:
            connection.shutdown(socket.SHUT_WR)


def receive_all(connection: socket.socket) -> bytes:
    """Receive until the other end closes; a reset counts as that, a silence does not."""
    received = bytearray()
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            received += data
    return bytes(received)


@contextmanager
def serving(
    source: Path,
    folder: Path,
    *arguments: object,
    prefix: Iterable[str] = (),
    port: bool = True,
    stderr: Any = None,
    **variables: str,
) -> Iterator[Service]:
    """Run `ghm serve`, in a session of its own, so that all of it can be ended.

    Args:
        source: The model or the folder of models.
        folder: Where the log is written.
        *arguments: Flags.
        prefix: A command that starts the service.
        port: Whether to ask for a free port with a flag.
        stderr: Where its log goes instead of a file.
        **variables: The environment, beside that of the tests.
    """
    command = [*prefix, *COMMAND, "serve", str(source), *map(str, arguments), "--threads", "1"]
    command += ["--port", "0"] if port else []
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "stderr.log"
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=ENVIRONMENT | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file if stderr is None else stderr,
            start_new_session=True,
            text=True,
        ) as process,
    ):
        try:
            yield Service(process, log)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGKILL)


class Canary:
    """Asks `/health/live` again and again while something else happens.

    Each answer must come within very many times of what one takes just before.
    """

    def __init__(self, service: Service, slower: float = _SLOWER) -> None:
        self.service = service
        self.slower = slower
        self.quiet = statistics.median(service.live() for _ in range(9))
        self.worst = 0.0
        self._done = threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        try:
            while not self._done.is_set():
                self.worst = max(self.worst, self.service.live())
        except (OSError, HTTPException, AssertionError) as error:
            self._problem = error

    def __enter__(self) -> "Canary":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._done.set()
        self._thread.join()
        if error is None:
            assert self._problem is None, self._problem
            assert self.worst <= self.slower * self.quiet, (
                f"/health/live took {self.worst:.2f} s, and {self.quiet:.4f} s just before"
            )


def run(*arguments: object, seconds: float = PATIENCE, **variables: str):
    """Run `ghm`; return the finished process, whose output is text."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def until(check: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Ask until the answer is true, and return it. Asking takes a moment, since it is a request."""
    started = perf_counter()
    while not (answer := check()):
        assert perf_counter() - started < seconds, "it did not happen in time"
    return answer


def head(*lines: bytes, first: bytes = b"POST /v1/detect HTTP/1.1", host: bytes = b"x") -> bytes:
    """The head of a request, with one Host."""
    return b"\r\n".join([first, b"Host: " + host, *lines, b"", b""])
