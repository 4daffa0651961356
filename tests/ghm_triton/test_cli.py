import argparse
import subprocess
import sys

import pytest

from ghm_triton import __version__, cli
from ghm_triton.options import Command

NAMES = ["train", "eval", "thresholds", "export", "attach", "inspect", "thresholds set"]
NAMES += ["verify", "predict", "serve", "demo"]


def test_every_package_lists_its_commands_in_the_order_of_use():
    assert [command.name for command in cli.gather()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_an_example_that_begins_with_the_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"  ghm {name} " in text


def test_gathering_the_commands_loads_nothing_heavy():
    code = (
        "import sys; from ghm_triton import cli; cli.build_parser(cli.gather());"
        "heavy = {'torch', 'torchvision', 'onnx', 'onnxruntime', 'fastapi', 'matplotlib'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"ghm-triton {__version__}"


def test_a_command_of_two_words_is_not_that_of_its_first_word():
    seen = []

    def command(name):
        def configure(parser):
            parser.add_argument("file")

        return Command(name, name, configure, lambda _: seen.append(name) or 0, "train")

    parser = cli.build_parser([command("thresholds"), command("thresholds set")])
    for words in (["thresholds", "set", "x.onnx"], ["thresholds", "x.pt"], ["thresholds", "./set"]):
        arguments = parser.parse_args(words)
        arguments.command.run(arguments)
        assert arguments.file == words[-1]
    assert seen == ["thresholds set", "thresholds", "thresholds"]


def failing(error: Exception) -> Command:
    def run(_: argparse.Namespace) -> int:
        raise error

    return Command("fail", "fails", lambda _: None, run, "serve")


def test_a_missing_package_names_the_extra(monkeypatch, capsys):
    error = ModuleNotFoundError("No module named 'fastapi'", name="fastapi")
    monkeypatch.setattr(cli, "gather", lambda: [failing(error)])
    assert cli.main(["fail"]) == 2
    assert "pip install 'ghm-triton[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("lr is 0"), FileNotFoundError("no x.pt"), ArithmeticError("NaN at 3")]
)
def test_an_error_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "gather", lambda: [failing(error)])
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == f"ghm: {error}\n"
