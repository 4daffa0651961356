"""Which packages each extra brings, and the messages where one is missing."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ghm_triton.extras import MissingExtraError, needed_by

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def packages(extra: str) -> set[str]:
    """The requirements of an extra, with those of the extras that it includes."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    names = set(project["dependencies"])
    for requirement in project["optional-dependencies"][extra]:
        included = re.fullmatch(r"ghm-triton\[(.+)\]", requirement)
        names |= (
            set().union(*map(packages, included[1].split(",")))
            if included
            else {re.match(r"[\w-]+", requirement)[0]}
        )
    return names


def test_torch_comes_with_the_losses_alone():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    with_torch = {extra for extra in extras if "torch" in packages(extra)}
    assert with_torch == {"loss", "train", "export", "all"}
    assert packages("client") == {"httpx"}


def without(*modules: str) -> str:
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize(
    ("package", "name", "module", "extra"),
    [
        ("ghm_triton", "GHMCLoss", "torch", "loss"),
        ("ghm_triton", "OHEM", "torch", "loss"),
        ("ghm_triton", "ClassStatistics", "numpy", "evidence"),
        ("service.client", "Client", "httpx", "client"),
    ],
)
def test_a_public_name_without_its_package_names_the_extra(package, name, module, extra):
    code = f"try:\n    from {package} import {name}\nexcept ImportError as error:\n    print(error)"
    message = f"needs the package '{module}': pip install 'ghm-triton[{extra}]'"
    user, _, rest = run(without(module) + code).strip().partition(" ")
    assert user in (package, f"{package}.{name}")
    assert rest == message


def test_evidence_works_without_torch():
    code = """
from ghm_triton import ClassStatistics, ClassThresholds
statistics = ClassStatistics(("cat", "dog"), 100, [5, 10])
print(ClassThresholds.from_statistics(statistics, "prior").as_array().tolist())
"""
    assert run(without("torch") + code).startswith("[0.05")


def test_what_needs_no_extra_imports_no_package():
    """`ghm --help` and the client start without numpy, pydantic and torch."""
    code = "from ghm_triton import cli; cli.build_parser(cli.gather()); import service.client"
    run(without("torch", "numpy", "pydantic", "rich", "PIL") + code)


@pytest.mark.parametrize("name", ["ghm_triton.gone", "service", None])
def test_a_missing_module_of_this_distribution_is_not_an_extra(name):
    error = ModuleNotFoundError("no such module", name=name)
    with pytest.raises(ModuleNotFoundError) as raised, needed_by("x", "serve"):
        raise error
    assert raised.value is error


def test_the_innermost_extra_is_named():
    message = r"^y needs .*\[loss\]"
    with (
        pytest.raises(MissingExtraError, match=message),
        needed_by("x", "a"),
        needed_by("y", "loss"),
    ):
        raise ModuleNotFoundError("no", name="torch")
