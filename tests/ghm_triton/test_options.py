"""Flags, defaults, help and checks generated from the fields of a dataclass."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import pytest

from ghm_triton.options import (
    FRACTION,
    POSITIVE,
    WEIGHT,
    Rule,
    add_options,
    at_least,
    check_options,
    chosen,
    option,
    require,
)


@dataclass(frozen=True)
class Options:
    source: Path = option(help="a positional", flag="source")
    out: Path = option(help="a required one", metavar="DIR")
    steps: int = option(100, "a number", check=at_least(1), group="work")
    rate: float = option(3e-3, "a real number, 50 % of it", check=POSITIVE, group="work")
    share: float | None = option(None, "an optional one", check=FRACTION, shown="all")
    kind: str = option("a", "a choice", choices=("a", "b"))
    resume: bool = option(False, "a switch")
    sampling: bool = option(True, "a switch that is on")
    board: str | None = option(None, "a flag with or without a value", nargs="?", const="here")
    weight: float = option(1.0, "a weight", check=WEIGHT)
    derived: int = 7
    inner: int = option(3, "no flag", check=at_least(1), hidden=True)

    def __post_init__(self):
        check_options(self)


def parsed(*words):
    parser = argparse.ArgumentParser(prog="ghm")
    add_options(parser, Options)
    return chosen(parser.parse_args([*words]), Options)


def test_only_given_options_are_chosen():
    assert parsed("x", "--out", "y") == {"source": Path("x"), "out": Path("y")}
    words = "x --out y --steps 3 --rate 0.5 --share 0.25 --kind b --resume --no-sampling --board"
    options = Options(**parsed(*words.split()))
    assert (options.steps, options.rate, options.share, options.kind) == (3, 0.5, 0.25, "b")
    assert (options.resume, options.sampling, options.board) == (True, False, "here")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x", "the following arguments are required: --out"),
        ("x --out y --steps many", "argument --steps: invalid int value: 'many'"),
        ("x --out y --kind c", "argument --kind: invalid choice: 'c'"),
        ("x --out y --derived 3", "unrecognized arguments: --derived 3"),
        ("x --out y --inner 3", "unrecognized arguments: --inner 3"),
    ],
)
def test_bad_words_exit_with_2(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_fields(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser(prog="ghm")
    add_options(parser, Options)
    text = " ".join(parser.format_help().split())
    for line in (
        "--out DIR a required one --share",
        "--steps STEPS a number (default: 100)",
        "--rate RATE a real number, 50 % of it (default: 0.003)",
        "--share SHARE an optional one (default: all)",
        "--resume a switch --sampling",
        "--no-sampling a switch that is on",
    ):
        assert line in text
    assert text.index("work: ") < text.rindex("--steps STEPS")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inner": 0}, "inner must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1.5"),
        ({"share": float("nan")}, r"share must lie in \[0, 1\], got nan"),
        ({"kind": "c"}, "kind must be one of a, b; got 'c'"),
        ({"weight": -1.0}, "weight must be finite and not negative, got -1.0"),
        ({"weight": float("inf")}, "weight must be finite and not negative, got inf"),
    ],
)
def test_checks_name_the_option_and_its_value(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Options(Path("x"), Path("y"), **changes)


def test_the_first_rule_that_refuses_gives_the_sentence():
    rules = [
        Rule(lambda o: o.steps > 5, "never shown {steps}"),
        Rule(lambda o: o.resume and o.kind == "b", "kind {kind!r} cannot resume"),
    ]
    require(rules, Options(Path("x"), Path("y"), steps=3, kind="b"))
    with pytest.raises(ValueError, match=r"^kind 'b' cannot resume$"):
        require(rules, Options(Path("x"), Path("y"), steps=3, kind="b", resume=True))
