"""Result files: truncated lines, and rows of this code on this machine."""

import json
from pathlib import Path

import pytest

from benchmarks.result_file import Rows, current, latest, read

HERE = {"source": "a", "gpu": None, "cpu": "one", "device": "cpu", "commit": "c"}


def test_rows_are_on_disk_at_once_with_their_origin(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    rows = Rows(path, HERE)
    added = rows.add({"loss": "bce"})
    assert added == {"loss": "bce", **HERE}
    assert read(path) == [added]  # while the file is still open
    assert rows.here({"loss": "bce"}) == [added]
    assert rows.here({"loss": "focal"}) == []
    assert rows.here({"stage": None}) == []  # what is missing is not None


def test_a_later_run_knows_the_rows_of_this_code_on_this_machine(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(path, HERE).add({"loss": "bce"})
    assert len(Rows(path, {**HERE, "commit": "other"}).here({"loss": "bce"})) == 1
    for name in ("source", "gpu", "cpu", "device"):
        assert Rows(path, {**HERE, name: "other"}).here({"loss": "bce"}) == [], name


def test_an_unfinished_line_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"loss": "bce"}\n{"loss": "fo')
    assert read(path) == [{"loss": "bce"}]
    Rows(path, {}).add({"loss": "ghm"})
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == ["bce", "ghm"]


def test_rows_that_are_there_are_never_written_again(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"loss": "bce"}\n{"loss": "fo')
    monkeypatch.setattr(Path, "write_bytes", lambda *_: pytest.fail("they could be lost"))
    file = path.stat().st_ino  # who holds a lock, holds it on this file
    Rows(path, {})
    assert path.read_text() == '{"loss": "bce"}\n'
    assert path.stat().st_ino == file


def test_the_last_of_each_kind_counts():
    rows = [
        {"loss": "bce", "shape": [1, 2], "ms": 1},
        {"loss": "ghm", "shape": [1, 2], "ms": 2},
        {"loss": "bce", "shape": [1, 3], "ms": 3},
        {"loss": "bce", "shape": [1, 2], "ms": 4},
    ]
    assert sorted(row["ms"] for row in latest(rows, ("loss", "shape"))) == [2, 3, 4]


def test_rows_of_older_code_are_left_out_device_by_device():
    rows = [
        {"gpu": "H100", "source": "old", "ms": 1},
        {"gpu": "H200", "source": "old", "ms": 2},
        {"gpu": "H100", "source": "new", "ms": 3},
        {"gpu": "H100", "source": "new", "ms": 4},
    ]
    assert [row["ms"] for row in current(rows)] == [2, 3, 4]
