"""Result files: JSON lines that a run appends to and a later run resumes from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Stages of a measurement, the field `stage`. Here, so that reading rows does not load torch.
COPY, FORWARD, BOTH, GRAPH = "copy", "forward", "forward+backward", "graph"
SCALED = "forward+backward, scaled"
SAME_PLACE = ("source", "gpu", "cpu", "device")


class Rows:
    """A result file open for appending; every line is flushed at once.

    Args:
        path: Created with its folder if missing. An unfinished last line of a killed run is
            dropped.
        origin: Fields added to every row. Existing rows count as done only if they agree with it
            in source, GPU, CPU and device: other code or another machine is measured again.
    """

    def __init__(self, path: Path, origin: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.origin = dict(origin)
        self._rows = read(path)
        path.touch()
        whole, newline, rest = path.read_bytes().rpartition(b"\n")
        if rest:
            # Truncate in place: the rows never disappear, and a lock on the file stays valid.
            os.truncate(path, len(whole + newline))
        self._path = path

    def add(self, row: Mapping[str, Any]) -> Row:
        """Append a row and return it with its origin."""
        full = {**row, **self.origin}
        with self._path.open("a") as stream:
            stream.write(json.dumps(full) + "\n")
        self._rows.append(full)
        return full

    def here(self, key: Mapping[str, Any]) -> list[Row]:
        """Rows of this code on this machine that match `key`."""
        place = {name: self.origin[name] for name in SAME_PLACE if name in self.origin}
        wanted = {**place, **key}
        return [row for row in self._rows if matches(row, wanted)]


def read(path: Path) -> list[Row]:
    """Rows of a file; none if it is missing. An unfinished last line is skipped."""
    if not path.exists():
        return []
    finished, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in finished.splitlines() if line]


def matches(row: Row, key: Mapping[str, Any]) -> bool:
    """Whether a row has all fields of `key` with equal values."""
    return all(name in row and row[name] == value for name, value in key.items())


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    """Format rows of equal keys as a Markdown table.

    Without pandas, which machines that only measure need not have.
    """
    rows = list(rows)
    head = list(rows[0]) if rows else []
    lines = [head, ["---"] * len(head), *(list(map(str, row.values())) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def latest(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The last row of each combination of the fields `names`."""
    kept: dict[str, Row] = {}
    names = tuple(names)
    for row in rows:
        key = json.dumps([row.get(name) for name in names])
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())


def current(rows: Iterable[Row]) -> list[Row]:
    """Rows of the newest source of each device."""
    rows = list(rows)
    last = {(row.get("device"), row.get("gpu")): row.get("source") for row in rows}
    return [row for row in rows if last[row.get("device"), row.get("gpu")] == row.get("source")]
