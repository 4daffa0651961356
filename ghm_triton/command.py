"""Subcommands of `ghm`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand of `ghm`.

    Packages list theirs under the entry point `ghm.commands`. The list of commands and `--help`
    must be quick and work without an extra, so `run` imports what it needs itself.

    Attributes:
        name: The words after `ghm`: one, or two such as `thresholds set`.
        help: One line for the list of commands.
        configure: Adds a description, arguments and an example to the parser of the command.
        run: Runs the command and returns its exit status, 0 for success.
        extra: The extra of the distribution that `run` needs, as in `ghm-triton[extra]`.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    extra: str
