import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ghm_triton.atomic import write_atomically


@pytest.mark.parametrize("unnamed", [True, False])
def test_writes_and_replaces(tmp_path, monkeypatch, unnamed):
    if not unnamed:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path = tmp_path / "x.onnx"
    for content in (b"first", b"second and longer"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    write_atomically(path, lambda stream: stream.write(b"streamed"))
    assert path.read_bytes() == b"streamed"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_keeps_the_file_that_it_opened(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_atomically(path, b"new one")
        assert reader.read() == b"old"


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    write_atomically(path, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "any").write_bytes(b"")
    write_atomically(tmp_path / "x", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("any", "x")}
    assert len(modes) == 1


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "none" / "x", b"")


@pytest.mark.parametrize("unnamed", [True, False])
def test_a_writer_that_is_killed_leaves_the_old_file_alone(tmp_path, unnamed):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"old")
    code = f"""
import os, signal, sys
from ghm_triton.atomic import write_atomically
if not {unnamed}:
    del os.O_TMPFILE
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], b"new" * 1000)
"""
    done = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    leftovers = [other.name for other in tmp_path.iterdir() if other != path]
    # A file without a name vanishes with its process; one with a name is hidden and no .onnx.
    assert len(leftovers) == (0 if unnamed and hasattr(os, "O_TMPFILE") else 1)
    assert not [name for name in leftovers if name.endswith(".onnx")]
