"""The README's section on production, held to what it speaks of."""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from export.file import read_detector
from service.app import create_app
from service.cli import SERVE
from service.core.settings import Settings, available_cpus
from service.engine.session import ServedModel
from service.observability.metrics import Metrics

README = Path(__file__).parents[2] / "README.md"
MIB = 2**20


@pytest.fixture(scope="module")
def section() -> str:
    (text,) = re.findall(r"^### In production\n(.*?)^##+ ", README.read_text(), re.M | re.S)
    return text


def rows(section: str, head: str) -> list[list[str]]:
    """The cells of a table, below its head."""
    table = section[section.index(f"| {head} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def shown(name: str, value: object) -> str:
    if name == "threads":
        assert value == available_cpus()
        return "the processors we may use"
    if name == "inferences":
        assert value == min(available_cpus(), 4)
        return "processors, up to 4"
    if name == "batch_size":
        assert value is None
        return "1 on a CPU, 8 on CUDA"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= MIB and value % MIB == 0:
        return f"{value // MIB} MiB"
    if isinstance(value, int | float):
        return str(value) if name == "port" else f"{value:,g}" if value < 1e6 else f"{value:,}"
    return "" if value is None else str(value)


def test_every_setting_with_its_default(section, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GHM_{name.upper()}", raising=False)
    table = {cells[0]: cells[1:] for cells in rows(section, "variable")}
    assert list(table) == [f"`GHM_{name.upper()}`" for name in Settings.model_fields]
    for name, value in Settings():
        default, meaning = table[f"`GHM_{name.upper()}`"]
        assert default == shown(name, value), name
        assert meaning or name == "log_level"


def test_every_metric_with_its_labels(section, card, write_detector):
    path = write_detector(
        statistics=replace(
            card.statistics,
            positive_scores=[[0, 900]] * 3,
            negative_scores=[[0, 0]] * 3,
        )
    )
    model = ServedModel(read_detector(path), provider="cpu")
    metrics = Metrics()
    metrics.model_loaded(model)
    metrics.request("/", "GET", 200, 1)
    metrics.stage("read", 1)
    metrics.rejected("deadline")
    metrics.reload_failed("x")
    told = {}
    for names, labels, _ in rows(section, "metric"):
        for name in re.findall(r"`(\w+)`", names):
            told[name] = {label.strip() for label in labels.split(",") if label.strip()}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        if not family.name.startswith("ghm_") or not family.samples:
            continue
        name = family.name + ("_total" if family.type == "counter" else "")
        found = {label for one in family.samples for label in one.labels} - {"le"}
        assert told.pop(name) == found, name
    assert set(told) == {"ghm_drift_psi", "ghm_drift_class_mix_psi"}  # absent without evidence


def test_the_command_and_the_unit_can_be_typed(section):
    parser = argparse.ArgumentParser()
    SERVE.configure(parser)
    typed = re.findall(r"ghm serve (\S.*)", section)
    assert len(typed) >= 2
    for arguments in typed:
        if "`" not in arguments:
            assert parser.parse_args(arguments.split()).workers == 4


def test_the_probes_ask_for_what_there_is(section, client: TestClient):
    asked = set(re.findall(r"path: ([\w/]+)", section))
    assert asked == {"/health/live", "/health/ready"}
    for path in asked:
        assert client.get(path).status_code == 200


def test_what_is_open_to_all_is(section, detector, model):
    settings = Settings(model=detector, threads=1, provider="cpu", tokens="abc")
    with TestClient(create_app(settings, model)) as client:
        public = section[section.index("gets 401.") :].partition("are public")[0]
        paths = re.findall(r"`([\w/.]+)`", public)
        assert paths == ["/", "/docs", "/openapi.json"]
        for path in paths:
            assert client.get(path).status_code != 401


def test_every_variable_in_the_readme_is_a_setting():
    known = {f"GHM_{name.upper()}" for name in Settings.model_fields} | {"GHM_PROVIDERS"}
    known.add("GHM_TOKEN")  # whoever asks has it
    assert set(re.findall(r"GHM_[A-Z_]+", README.read_text())) <= known
