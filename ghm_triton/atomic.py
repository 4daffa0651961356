"""Writing a file so that a reader sees the old one or the new one, and never half of one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file that a reader sees whole or not at all, even if the machine stops half-way.

    Where the system has files without a name (Linux), a process that is killed meanwhile leaves
    nothing behind.

    Args:
        path: Where to write. A file that is there is replaced.
        content: The bytes.

    Raises:
        OSError: The folder is missing or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor, unnamed = _open_new(temporary)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            if unnamed:  # the folder is given so that the link is followed to the file behind it
                os.link(f"/proc/self/fd/{descriptor}", temporary, src_dir_fd=descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _open_new(path: Path) -> tuple[int, bool]:
    """Open a new file for writing: `(descriptor, whether it has no name yet)`.

    Not by tempfile: its files are private, and this one becomes a file like any other.
    """
    if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
        try:
            return os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o666), True
        except OSError:  # a file system without them; what else is wrong, the next line says
            pass
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), False


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` last, where folders can be opened (not on Windows)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
