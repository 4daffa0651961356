"""The study's result file: finished and failed trainings, and estimates of time."""

from __future__ import annotations

import fcntl
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.result_file import Row, Rows, matches, read
from benchmarks.study.plan import SETTING, Run, key_of

RECENT = 10  # runs per estimate
MARGIN = 1.2  # runs that share a machine vary in time


class BusyError(RuntimeError):
    """Another study has the file open."""


class Ledger:
    """A result file, locked while it is open.

    Args:
        path: Created with its folder if missing.
        machine: `cpu` and `gpu` of the provenance; estimates are of runs on this machine.
        again: Whether to ignore recorded runs.

    Raises:
        BusyError: Another process has it open.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], *, again: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise BusyError(f"another study is writing to {path}; choose another --out") from error
        self._machine = {name: machine.get(name) for name in ("cpu", "gpu")}
        self._all = read(path)
        self._done = [] if again else [row for row in self._all if "error" not in row]
        self._rows = Rows(path, {})  # rows have their own origin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    def found(self, run: Run) -> Row | None:
        """Return the last successful row of a run's training, of any section."""
        return lookup(self._done, run)

    def settle(self, places: Sequence[Run], row: Row) -> None:
        """Write a training's row for every place in the grid, unless it is the last one there.

        The last row of a place counts: if a default was changed and changed back, the row must be
        repeated after the other.
        """
        for run in places:
            last = self._last(run)
            if last is None or key_of(last) != key_of(run.key()):
                added = self._rows.add({**row, **run.place()})
                self._all.append(added)
                self._done.append(added)

    def _last(self, run: Run) -> Row | None:
        """Return the last successful row of a place in the grid, whatever its options."""
        key = run.key()
        place = {**run.place(), **{name: key[name] for name in SETTING}}
        return next((row for row in reversed(self._done) if matches(row, place)), None)

    def fail(self, places: Sequence[Run], error: str, origin: Mapping[str, Any]) -> None:
        """Record that a training failed; the next call tries it again."""
        for run in places:
            self._rows.add({**run.head(), "error": error, **origin})

    def estimate(self, run: Run) -> float:
        """Estimate the seconds of a run from recent ones on this machine; 0 if unknown."""
        key = run.key()
        rows = [
            row for row in self._all if row.get("total_seconds") and matches(row, self._machine)
        ]
        for like in ({"data": key["data"], "detector": key["detector"]}, {}):
            alike = [row for row in rows if matches(row, like)][-RECENT:]
            if alike:
                pace = statistics.median(row["total_seconds"] / row["steps"] for row in alike)
                return MARGIN * float(pace) * run.options.steps
        return 0.0


def lookup(rows: Sequence[Row], run: Run) -> Row | None:
    """Return the last row of a run's training."""
    key = key_of(run.key())
    return next((row for row in reversed(rows) if key_of(row) == key), None)
