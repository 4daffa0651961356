"""What workers count together: one folder, a file or several a worker, summed by whoever reads.

The counters and histograms are prometheus_client's own files (its multi-process mode); the live
counts of drift lie beside them. A worker that has ended takes its share of gauges and live counts
with it, but what it has counted stays: a counter that falls would look like a restart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector

# prometheus_client reads it when it is first imported, and then writes into that folder.
VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

# prometheus_client has no types for these.
_merge: Any = MultiProcessCollector.merge
_Values: Any = MmapedDict

_RETIRED = "retired"
_SUMMED = ("counter", "histogram")


class WorkerFiles:
    """The folder that workers share.

    Args:
        folder: It exists; nothing else is in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of_environment(cls) -> WorkerFiles | None:
        """The folder that this process was told to share; None for a process on its own."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder)) if folder else None

    def own_counts(self, key: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """This worker's live counts, float64 of `shape`, all zero, in a file that others can read.

        Args:
            key: Names what is counted; a part of a file's name.
            shape: The same in every worker.
        """
        path = self.folder / f"live-{key}-{os.getpid()}.f64"
        counts: npt.NDArray[np.float64] = np.memmap(path, np.float64, "w+", shape=shape)
        return counts

    def all_counts(self, key: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
        """The sum of the live counts of every worker, float64 of `shape`."""
        total = np.zeros(shape)
        with self._lock():
            for path in self.folder.glob(f"live-{key}-*.f64"):
                counts = np.fromfile(path, np.float64)
                if counts.size == total.size:  # not one that is being made
                    total += counts.reshape(shape)
        return total

    def collect(self) -> list[Metric]:
        """The sums over all workers, those that ended included."""
        with self._lock():
            files = [str(path) for path in self.folder.glob("*.db") if path.stat().st_size > 0]
            metrics: list[Metric] = list(_merge(files, accumulate=True))
            return metrics

    def retire(self, pid: int) -> None:
        """Keep what a worker that has ended has counted, and remove its files."""
        with self._lock(alone=True):
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
            for key, value, _, _ in _Values.read_all_values_from_file(str(source)):
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
        finally:
            sums.close()

    @contextmanager
    def _lock(self, alone: bool = False) -> Iterator[None]:
        """A reader must not see a worker's counts twice, or not at all, while it is retired."""
        import fcntl  # not on Windows, where there is one process only

        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            yield
