"""Optional dependencies: which extra of the distribution installs what is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGES = ("ghm_triton", "export", "service")  # a module missing here is a defect, not an extra


class MissingExtraError(ModuleNotFoundError):
    """A package is not installed; the message names the extra that installs it."""


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra.

    Example:
        >>> how_to_install("serve")
        "pip install 'ghm-triton[serve]'"
    """
    return f"pip install 'ghm-triton[{extra}]'"


@contextmanager
def needed_by(user: str, extra: str) -> Iterator[None]:
    """Name the extra to install if an import in the block fails.

    Args:
        user: The command or name that imports, the subject of the message.
        extra: The extra that it needs.

    Raises:
        MissingExtraError: A package of another distribution is missing.

    Example:
        >>> with needed_by("`ghm fly`", "wings"):
        ...     import feathers
        Traceback (most recent call last):
        ...
        ghm_triton.extras.MissingExtraError: `ghm fly` needs the package 'feathers': \
pip install 'ghm-triton[wings]'
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in _PACKAGES:
            raise
        raise MissingExtraError(
            f"{user} needs the package {error.name!r}: {how_to_install(extra)}", name=error.name
        ) from error


def disable_telemetry() -> None:
    """Keep onnxruntime from sending telemetry, unless the user set `ORT_DISABLE_TELEMETRY`.

    The variable is read when onnxruntime is imported, so each package that imports it calls this
    first, in its `__init__.py`.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
