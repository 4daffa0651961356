"""Counts of several workers, in one folder of files that readers sum.

Counters and histograms are in prometheus_client's own files (its multi-process mode), the live
counts of drift beside them. When a worker ends, its gauges and live counts go, but its counters
stay: prometheus_client would drop them, and a counter that falls looks like a restart.

The files are mapped, so their space is allocated when they are created: writing to a page that a
full disk cannot hold ends a process with SIGBUS.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from prometheus_client import values
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

# prometheus_client reads this variable when it is first imported.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_IN_MEMORY = "/dev/shm"  # noqa: S108  a folder of its own is created there
_ROOM_BYTES = 2**22  # for the files of a few workers
_VALUES_BYTES = 2**18  # some thousand series; prometheus_client's files grow beyond it

# prometheus_client has no types for these.
_merge: Any = MultiProcessCollector.merge
_read: Any = MmapedDict.read_all_values_from_file

_RETIRED = "retired"
_SUMMED = ("counter", "histogram")


def shared_folder() -> TemporaryDirectory[str]:
    """Create a folder for `WorkerFiles`, in `TMPDIR`, in memory, or among temporary files.

    Raises:
        OSError: None of them has room for the files of a worker.
    """
    first = None if "TMPDIR" in os.environ else _IN_MEMORY
    with suppress(OSError):
        return _folder_with_room(first)
    return _folder_with_room(_IN_MEMORY if first is None else None)


def _folder_with_room(parent: str | None) -> TemporaryDirectory[str]:
    folder = TemporaryDirectory(prefix="ghm-", dir=parent)
    probe = Path(folder.name, "probe")
    try:
        with probe.open("wb") as file:
            allocate(file, _ROOM_BYTES)
        probe.unlink()
    except OSError:
        folder.cleanup()
        raise
    return folder


def allocate(file: IO[bytes], size: int) -> None:
    """Give a file at least `size` bytes, zeros at first, that can be written to for certain.

    Raises:
        OSError: The disk is full.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(file.fileno(), 0, size)
    elif os.fstat(file.fileno()).st_size < size:
        file.truncate(size)


class _Values(MmapedDict):
    """prometheus_client's file of values, allocated."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if not read_mode:
            with Path(filename).open("a+b") as file:
                allocate(file, _VALUES_BYTES)
        super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]


values.MmapedDict = _Values  # type: ignore[attr-defined]  # it has no other hook for it


class WorkerFiles(Collector):
    """The folder that workers share.

    Args:
        folder: An existing folder with nothing else in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_environment(cls) -> WorkerFiles | None:
        """Return the folder that the environment names; None for a process on its own."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def own_counts(self, key: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Create this worker's live counts, float64 of `shape`, all zero, in a shared file."""
        path = self.folder / f"live-{key}-{os.getpid()}.f64"
        with path.open("w+b") as file:
            allocate(file, np.dtype(np.float64).itemsize * math.prod(shape))
        counts: npt.NDArray[np.float64] = np.memmap(path, np.float64, "r+", shape=shape)
        return counts

    def all_counts(self, key: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """Return the sum of the live counts over all workers, float64 of `shape`."""
        total = np.zeros(shape)
        with self._lock():
            for path in self.folder.glob(f"live-{key}-*.f64"):
                counts = np.fromfile(path, np.float64)
                if counts.size == total.size:  # else it is being created
                    total += counts.reshape(shape)
        return total

    def collect(self) -> list[Metric]:
        """Return the sums over all workers, including those that have ended."""
        with self._lock():
            files = [str(path) for path in self.folder.glob("*.db") if path.stat().st_size > 0]
            metrics: list[Metric] = list(_merge(files, accumulate=True))
            return metrics

    def retire(self, pid: int) -> None:
        """Keep the counters of a worker that has ended, and remove its files."""
        with self._lock(exclusive=True):
            for kind in _SUMMED:
                path = self.folder / f"{kind}_{pid}.db"
                if path.exists():
                    self._add(path, self.folder / f"{kind}_{_RETIRED}.db")
                    path.unlink()
            for pattern in (f"gauge_live*_{pid}.db", f"live-*-{pid}.f64"):
                for path in self.folder.glob(pattern):
                    path.unlink()

    def _add(self, source: Path, target: Path) -> None:
        if source.stat().st_size == 0:
            return
        sums: Any = _Values(str(target))
        try:
            for key, value, _, _ in _read(str(source)):
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
        finally:
            sums.close()

    @contextmanager
    def _lock(self, exclusive: bool = False) -> Iterator[None]:
        """Keep readers out while a worker is retired: they would count it twice, or not at all."""
        import fcntl  # not on Windows, where there is one process only

        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            yield
