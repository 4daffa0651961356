"""Start processes on chosen cores and measure their processor time and memory."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Proportional set size of this process."""
    return _proportional(os.getpid())


@contextmanager
def running(
    command: Sequence[str], cores: Sequence[int], *, speaks: bool = False, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """Run a process and its children pinned to cores; kill them at the end.

    Args:
        command: The command.
        cores: Cores that it may use.
        speaks: Whether its stdout is read; otherwise it is discarded.
        **environment: Additional environment variables.
    """
    pinned = ["taskset", "--cpu-list", ",".join(map(str, cores)), *command]
    process = subprocess.Popen(
        pinned,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if speaks else subprocess.DEVNULL,
        stderr=sys.stderr,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in tree(process.pid):
            _kill(pid)
        process.wait()


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a process listens on a port.

    Raises:
        RuntimeError: The process ended, or the time is up.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)  # other servers do not signal readiness
        else:
            return
    raise RuntimeError(f"{process.args} does not listen at {port} after {seconds} s")


def tree(pid: int) -> list[int]:
    """List a process and its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, []))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its descendants."""
    total = 0
    for each in tree(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants, shared pages counted once."""
    return sum(_proportional(each) for each in tree(pid))


def _proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line[:4] == "Pss:")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
