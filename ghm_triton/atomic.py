"""Atomic replacement of files: a reader sees the old file or the new one, never a part of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: str | Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Write a file that readers see whole or not at all, even after a power failure.

    Where the system has files without a name (Linux), a process that is killed while it writes
    leaves nothing behind.

    Args:
        path: Where to write. An existing file is replaced.
        content: The bytes, or a function that writes them to the stream it is passed.

    Raises:
        OSError: The folder is missing or not writable.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor, unnamed = _open_new(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if unnamed:  # src_dir_fd makes `link` follow /proc's symbolic link to the file
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _open_new(path: Path) -> tuple[int, bool]:
    """Open a new file for writing; return its descriptor, and whether it has no name yet.

    The tempfile module would make it private, mode 0600; this file has the usual permissions.
    """
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        try:
            return os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o666), True
        except OSError:  # not on this file system; any other error recurs below
            pass
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), False


def _sync_folder(folder: Path) -> None:
    """Flush a rename in `folder` to disk, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
