"""Model files of a folder, by name and version.

    NAME.onnx                   model NAME, version 1
    NAME/VERSION.onnx           model NAME, version VERSION
    NAME/VERSION/model.onnx     the same, in the layout of other inference servers

Other files, and those whose name begins with a dot, are ignored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Names are part of URLs and metrics.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}")

FIRST_VERSION = "1"


class CatalogueError(ValueError):
    """A folder without models that can be served."""


@dataclass(frozen=True)
class Signature:
    """Times, size and inode of a file: different if its content or its permissions changed."""

    modified_ns: int
    changed_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Signature | None:
        """Return the current signature of a file, or None if there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)


@dataclass(frozen=True)
class Listed:
    """A model file, and its name and version. A single file's name is None: its card has it."""

    path: Path
    name: str | None
    version: str


def list_models(source: Path) -> tuple[list[Listed], dict[Path, str]]:
    """List the models of a file or folder.

    Args:
        source: A `.onnx` file or a folder of them.

    Returns:
        The files, by name and then by version, the newest version last; and the reason per entry
        of the folder that cannot be listed: a folder that cannot be read, an invalid name, or the
        name and version of another file.

    Raises:
        OSError: The folder itself cannot be read.
    """
    if not source.is_dir():
        return [Listed(source, None, FIRST_VERSION)], {}
    models: dict[tuple[str, str], Listed] = {}
    problems: dict[Path, str] = {}
    for path in sorted(source.iterdir()):
        try:
            files = _models(path)
        except OSError as error:
            problems[path] = str(error.strerror)
            continue
        for listed in files:
            key = (str(listed.name), listed.version)
            if invalid := [name for name in key if not _NAME.fullmatch(name)]:
                problems[listed.path] = (
                    f"{invalid[0]!r} is no name for a model: letters, digits, and . _ - or a space"
                    " inside, at most 128"
                )
            elif key in models:
                problems[listed.path] = (
                    f"{models[key].path} is version {key[1]} of {key[0]} already"
                )
            else:
                models[key] = listed
    ordered = sorted(models.values(), key=lambda one: (str(one.name), version_key(one.version)))
    return ordered, problems


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Return the sort key that orders versions by number: 2 before 10, 1.9 before 1.10."""
    parts = re.findall(r"\d+|\D+", version)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _models(path: Path) -> list[Listed]:
    """Return the models of an entry of the folder: a file, or a folder of versions."""
    if not _may_be_model(path):
        return []
    if path.is_file():
        return [Listed(path, path.stem, FIRST_VERSION)]
    listed = []
    for inner in filter(_may_be_model, sorted(path.iterdir())):
        if inner.is_file():
            listed.append(Listed(inner, path.name, inner.stem))
        elif (inner / "model.onnx").exists():
            listed.append(Listed(inner / "model.onnx", path.name, inner.name))
    return listed


def _may_be_model(path: Path) -> bool:
    return not path.name.startswith(".") and (path.suffix == ".onnx" or path.is_dir())
