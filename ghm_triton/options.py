"""Subcommands of `ghm`, and their options: written once, as fields of a dataclass.

A field made by `option` carries its default, help text, choices and value check. `add_options`
generates the flags of a parser from such fields, `chosen` reads them back, and `check_options`
validates an instance, whether its values come from a command line, a file or Python.
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints


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


class Check(NamedTuple):
    """A condition on a value; `text` completes the sentence "NAME must ..."."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Check("be positive", lambda value: value > 0)
FRACTION = Check("lie in [0, 1]", lambda value: 0.0 <= value <= 1.0)
WEIGHT = Check("be finite and not negative", lambda value: math.isfinite(value) and value >= 0)


def at_least(least: int) -> Check:
    """A check that a value is `least` or more."""
    return Check(f"be at least {least}", lambda value: value >= least)


class Rule(NamedTuple):
    """A combination of values that is refused; the sentence may name `{values}` by attribute."""

    refused: Callable[[Any], bool]
    sentence: str


def require(rules: Iterable[Rule], values: Any) -> None:
    """Raise ValueError with the sentence of the first rule that refuses `values`."""
    for rule in rules:
        if rule.refused(values):
            raise ValueError(rule.sentence.format(**vars(values)))


@dataclass(frozen=True)
class _Option:
    help: str
    flag: str | None
    choices: tuple[str, ...] | None
    check: Check | None
    group: str | None
    shown: str | None
    hidden: bool
    argparse: dict[str, Any]


def option(
    default: Any = MISSING,
    help: str = "",  # noqa: A002  (argparse's name)
    *,
    flag: str | None = None,
    choices: Sequence[str] | None = None,
    check: Check | None = None,
    group: str | None = None,
    shown: str | None = None,
    hidden: bool = False,
    **arguments: Any,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: Default of the field. Without it (and without `shown`) the option is required.
        help: One sentence; the default is appended to it.
        flag: By default the field's name with dashes; a name without leading dashes is positional.
        choices: Allowed values.
        check: Condition that any value but a default of None satisfies.
        group: Heading in `--help`.
        shown: The default in `--help`, where the value does not print well; empty hides it.
        hidden: The field is checked and documented, but is no flag.
        **arguments: For `add_argument`: `metavar`, `type`, `nargs`, `const`. The type is by
            default the annotated one.
    """
    allowed = None if choices is None else tuple(choices)
    entry = _Option(help, flag, allowed, check, group, shown, hidden, arguments)
    return field(default=default, metadata={"option": entry})


def add_options(parser: argparse.ArgumentParser, *classes: type) -> None:
    """Add the options of dataclasses to a parser. Those that are not given stay unset."""
    groups: dict[str | None, argparse._ActionsContainer] = {None: parser}
    for cls in classes:
        hints = get_type_hints(cls)
        for entry, spec in _flags(cls):
            if spec.group not in groups:
                groups[spec.group] = parser.add_argument_group(spec.group)
            _add(groups[spec.group], entry, spec, hints[entry.name])


def chosen(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The options of a dataclass that were given on the command line, by field name."""
    names = [entry.name for entry, _ in _flags(cls)]
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def check_options(options: Any) -> None:
    """Validate the fields of a dataclass; call it from `__post_init__`.

    Raises:
        ValueError: A value is not one of the choices or fails its check; the message names both.
    """
    for entry, spec in _options(type(options)):
        value = getattr(options, entry.name)
        if value is None and entry.default is None:
            continue
        if spec.choices is not None and value not in spec.choices:
            allowed = ", ".join(spec.choices)
            raise ValueError(f"{entry.name} must be one of {allowed}; got {value!r}")
        if spec.check is not None and not spec.check.holds(value):
            end = "" if spec.check.text.endswith(";") else ","
            raise ValueError(f"{entry.name} must {spec.check.text}{end} got {value!r}")


def _options(cls: type) -> list[tuple[Field[Any], _Option]]:
    entries = fields(cls)
    return [(entry, entry.metadata["option"]) for entry in entries if "option" in entry.metadata]


def _flags(cls: type) -> list[tuple[Field[Any], _Option]]:
    return [(entry, spec) for entry, spec in _options(cls) if not spec.hidden]


def _add(group: argparse._ActionsContainer, entry: Field[Any], spec: _Option, hint: Any) -> None:
    flag = spec.flag or f"--{entry.name.replace('_', '-')}"
    required = entry.default is MISSING and spec.shown is None
    how: dict[str, Any] = {"help": _help(entry, spec), "default": argparse.SUPPRESS}
    if get_origin(hint) in (Union, types.UnionType):  # the annotation without None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if hint is bool:
        how["action"] = "store_true" if entry.default is False else argparse.BooleanOptionalAction
    else:
        how |= {"choices": spec.choices, "type": hint, **spec.argparse}
    if flag.startswith("-"):
        group.add_argument(flag, dest=entry.name, required=required, **how)
    else:
        group.add_argument(entry.name, nargs=None if required else "?", **how)


def _help(entry: Field[Any], spec: _Option) -> str:
    default = entry.default
    if spec.shown is not None:
        shown = spec.shown
    elif default is MISSING or default is None or default is False:
        shown = ""
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    return (f"{spec.help} (default: {shown})" if shown else spec.help).replace("%", "%%")
