"""What a package contributes to the `ghm` command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand of `ghm`.

    Packages list theirs under the entry point `ghm.commands`. Listing and `--help` stay quick
    and work without the command's packages: whatever is heavy is imported inside `run`.

    Attributes:
        name: What is typed after `ghm`; one word, or two, such as `thresholds set`.
        help: One line for the list of commands.
        configure: Adds the description, the arguments and an example to the command's parser.
        run: Does the work and returns the exit status: 0 for success.
        extra: The extra of the distribution that `run` needs, as in `ghm-triton[extra]`.
    """

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    extra: str
