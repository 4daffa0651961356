"""Result files: JSON lines that a run adds to, and that a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# What was measured: a row's `stage`. Here, so that who only reads rows need not load torch.
COPY, FORWARD, BOTH, GRAPH = "copy", "forward", "forward+backward", "graph"
SCALED = "forward+backward, scaled"
SAME_PLACE = ("source", "gpu", "cpu", "device")


class Rows:
    """A result file that is being added to, a line at a time, flushed at once.

    Args:
        path: Made, with its folder, where missing. A last line that a killed run left unfinished
            is dropped.
        origin: Goes into every row. Rows already there count as done only where they agree with
            it on source, GPU, CPU and device: other code or another machine is measured anew.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.origin = dict(origin)
        self._rows = read(path)
        path.touch()
        whole, newline, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            # Cut off in place: no moment without the rows, and a lock on the file still holds.
            os.truncate(path, len(whole + newline))
        self._path = path

    def add(self, row: Mapping[str, Any]) -> Row:
        """Write one row; returns it with its origin."""
        full = {**row, **self.origin}
        with self._path.open("a") as stream:
            stream.write(json.dumps(full) + "\n")
        self._rows.append(full)
        return full

    def here(self, key: Mapping[str, Any]) -> list[Row]:
        """Rows of this code on this machine that have all of `key`."""
        place = {name: self.origin[name] for name in SAME_PLACE if name in self.origin}
        wanted = {**place, **key}
        return [row for row in self._rows if matches(row, wanted)]


def read(path: Path) -> list[Row]:
    """The rows of a file, which may be missing; an unfinished last line is not one."""
    if not path.exists():
        return []
    finished, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in finished.splitlines() if line]


def matches(row: Row, key: Mapping[str, Any]) -> bool:
    """Whether a row has all of `key`."""
    return all(name in row and row[name] == value for name, value in key.items())


def latest(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The last row of each combination of `names`: what was measured again replaces the old."""
    kept: dict[str, Row] = {}
    names = tuple(names)
    for row in rows:
        key = json.dumps([row.get(name) for name in names])
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def current(rows: Iterable[Row]) -> list[Row]:
    """Of each device, only the rows of the source that it measured last."""
    rows = list(rows)
    last = {(row.get("device"), row.get("gpu")): row.get("source") for row in rows}
    return [row for row in rows if last[row.get("device"), row.get("gpu")] == row.get("source")]
