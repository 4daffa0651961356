"""The study's result file: what is done, what failed, and how long the rest may take."""

from __future__ import annotations

import fcntl
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.result_file import Row, Rows, matches, read
from benchmarks.study.plan import SETTING, Run, key_of

RECENT = 10  # runs that an estimate is made of
MARGIN = 1.2  # runs that share a machine do not all take the same time


class BusyError(RuntimeError):
    """Another study is writing to the file."""


class Ledger:
    """A result file, locked while it is open.

    Args:
        path: Made, with its folder, where missing.
        machine: `cpu` and `gpu` as provenance names them: estimates are of runs on this one.
        again: Whether runs that were there before count for nothing.

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
        self._rows = Rows(path, {})  # rows bring their origin along

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
        """The last sound row of the training that a run comes to, wherever it was asked for."""
        return lookup(self._done, run)

    def settle(self, places: Sequence[Run], row: Row) -> None:
        """Write a training's row under every place that wants it, unless it stands last there.

        The last row of a place counts: where a default was changed and changed back, the row that
        is wanted again must come after the other.
        """
        for run in places:
            last = self._last(run)
            if last is None or key_of(last) != key_of(run.key()):
                added = self._rows.add({**row, **run.place()})
                self._all.append(added)
                self._done.append(added)

    def _last(self, run: Run) -> Row | None:
        """The last sound row of a place in the grid, whatever it was trained with."""
        key = run.key()
        place = {**run.place(), **{name: key[name] for name in SETTING}}
        return next((row for row in reversed(self._done) if matches(row, place)), None)

    def fail(self, places: Sequence[Run], error: str, origin: Mapping[str, Any]) -> None:
        """Write down that a training failed; it is tried again by the next call."""
        for run in places:
            self._rows.add({**run.head(), "error": error, **origin})

    def estimate(self, run: Run) -> float:
        """Seconds that a run will take, by the recent ones on this machine; 0 if unknown."""
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
    """The last of the rows that a run's training has."""
    key = key_of(run.key())
    return next((row for row in reversed(rows) if key_of(row) == key), None)
