"""Which files a folder of models holds, by name and version.

    NAME.onnx                   model NAME, version 1
    NAME/VERSION.onnx           model NAME, version VERSION
    NAME/VERSION/model.onnx     the same, in the layout of other inference servers

Other files, and all whose name begins with a dot, are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Names go into addresses and metrics.
_HARMLESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}")

FIRST_VERSION = "1"


class CatalogueError(ValueError):
    """The folder does not say clearly which models it holds."""


@dataclass(frozen=True)
class Signature:
    """Tells whether a file is still the one that was read."""

    modified_ns: int
    size: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Signature | None:
        """The signature of a file as it is now; None where there is none."""
        try:
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_mtime_ns, found.st_size, found.st_ino)


@dataclass(frozen=True)
class Listed:
    """A file, and what requests call it. A single file's name is None: its card says it."""

    path: Path
    name: str | None
    version: str


def list_models(source: Path) -> list[Listed]:
    """The models of a file or a folder.

    Args:
        source: One `.onnx` file, or a folder of them.

    Returns:
        The files, by name and then by version, the newest version last.

    Raises:
        CatalogueError: Two files are the same version of one model, or a name has signs that an
            address cannot carry.
    """
    if not source.is_dir():
        return [Listed(source, None, FIRST_VERSION)]
    found: dict[tuple[str, str], Listed] = {}
    for listed in _walk(source):
        key = (str(listed.name), listed.version)
        if key in found:
            raise CatalogueError(
                f"{found[key].path} and {listed.path} are both version {key[1]} of {key[0]}"
            )
        found[key] = listed
    return sorted(found.values(), key=lambda one: (str(one.name), version_key(one.version)))


def version_key(version: str) -> list[tuple[int, int, str]]:
    """Orders versions as people do: 2 before 10, 1.9 before 1.10."""
    parts = re.findall(r"\d+|\D+", version)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _walk(folder: Path) -> Iterator[Listed]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _versions(path)
        elif path.suffix == ".onnx":
            yield Listed(path, _checked(path.stem, path), FIRST_VERSION)


def _versions(folder: Path) -> Iterator[Listed]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and (path / "model.onnx").exists():
            name, version, path = folder.name, path.name, path / "model.onnx"
        elif path.suffix == ".onnx":
            name, version = folder.name, path.stem
        else:
            continue
        yield Listed(path, _checked(name, path), _checked(version, path))


def _checked(name: str, path: Path) -> str:
    if not _HARMLESS.fullmatch(name):
        raise CatalogueError(
            f"{path}: {name!r} is no name for a model: letters, digits, and . _ - or a space"
            " inside, at most 128"
        )
    return name
