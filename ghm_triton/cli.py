"""The command line `ghm`: the commands of every installed package."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

from ghm_triton import __version__
from ghm_triton.demo import DEMO
from ghm_triton.detection.commands import EVAL, THRESHOLDS, TRAIN
from ghm_triton.extras import MissingExtraError, needed_by
from ghm_triton.options import Command
from ghm_triton.tables import printable_lines

COMMANDS = (TRAIN, EVAL, THRESHOLDS, DEMO)

GROUP = "ghm.commands"
ORDER = (
    *("train", "eval", "thresholds", "export", "attach", "inspect", "thresholds set", "verify"),
    *("predict", "serve", "demo"),
)


def gather() -> list[Command]:
    """Return the commands that installed packages list under the entry point `ghm.commands`."""
    commands = [command for entry in entry_points(group=GROUP) for command in entry.load()]
    rank = {name: index for index, name in enumerate(ORDER)}
    return sorted(commands, key=lambda command: (rank.get(command.name, len(rank)), command.name))


class _Parser(argparse.ArgumentParser):
    """A parser that accepts commands of two words, such as `thresholds set`."""

    pairs: frozenset[str] = frozenset()

    def parse_known_args(  # type: ignore[override]  # typeshed overloads by the namespace's class
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        if " ".join(words[:2]) in self.pairs:
            words[:2] = [" ".join(words[:2])]
        return super().parse_known_args(words, namespace)


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """Return the parser of `ghm`, with a subparser per command."""
    parser = _Parser(
        prog="ghm",
        description="Train detectors with harmonized losses, derive class thresholds from training"
        " statistics, export both in one ONNX file and serve it.",
        epilog="To run all of it in minutes: ghm demo",
    )
    parser.add_argument("--version", action="version", version=f"ghm-triton {__version__}")
    parser.pairs = frozenset(command.name for command in commands if " " in command.name)
    subparsers = parser.add_subparsers(
        metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )
    for command in commands:
        subparser = subparsers.add_parser(
            command.name,
            help=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(subparser)
        subparser.set_defaults(command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ghm` and return its exit code: 0 for success, 1 for a failed check, 2 for an error."""
    arguments = build_parser(gather()).parse_args(argv)
    command: Command = arguments.command
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning)
        warnings.showwarning = _warn
        return _run(command, arguments)


def _run(command: Command, arguments: argparse.Namespace) -> int:
    try:
        with needed_by(f"`ghm {command.name}`", command.extra):
            return command.run(arguments)
    except (MissingExtraError, ValueError, OSError, ArithmeticError) as error:
        return _refuse(f"{error}")
    except KeyboardInterrupt:
        return _refuse("interrupted")


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning without the line of code that raised it."""
    print(f"ghm: warning: {printable_lines(str(message))}", file=sys.stderr)


def _refuse(reason: str) -> int:
    print(f"ghm: {printable_lines(reason)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
