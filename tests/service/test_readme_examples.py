"""The README's examples of asking the service, run as they are printed there."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ghm_triton import cli
from service.app import create_app, load_model
from service.core.settings import Settings

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8000"
CLASSES = ["3", "7", "8"]  # of the README's detector, those that it speaks of


def section(title: str, after: str) -> str:
    (text,) = re.findall(rf"^{title}\n(.*?)^{after}", README.read_text(), re.M | re.S)
    return text


SERVICE = section("## The service", "## ")
COMMANDS = [
    line.removeprefix("$ ")
    for line in re.findall(r"^\$ .*", SERVICE, re.M)
    if not line.startswith("$ ghm serve")
]


@pytest.fixture(scope="module")
def url(write_detector, card, serve) -> str:
    thresholds = [
        replace(entry, name=name) for entry, name in zip(card.thresholds, CLASSES, strict=True)
    ]
    path = write_detector(class_names=CLASSES, thresholds=thresholds)
    settings = Settings(model=path, threads=1, provider="cpu")
    model = load_model(settings)
    model.warm_up()
    with serve(create_app(settings, model)) as url:
        yield url


@pytest.fixture
def folder(image: Image.Image, tmp_path, monkeypatch) -> Path:
    image.save(tmp_path / "photo.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GHM_TOKEN", "anything")  # this service asks for none
    return tmp_path


def test_all_ways_are_shown():
    assert len(COMMANDS) == 9
    for word in ("file=", "files=", "thresholds=", "format=image", "preview", "predict --url"):
        assert any(word in command for command in COMMANDS), word


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, url, folder, capsys):
    assert ADDRESS in command
    command = command.replace(ADDRESS, url)
    if command.startswith("ghm "):
        assert cli.main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out.startswith("photo.jpg: 3 detections\n")
        return
    command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    done = subprocess.run(["sh", "-c", command], capture_output=True, check=True, text=True)
    if "-o drawn.png" in command:
        assert Image.open(folder / "drawn.png").format == "PNG"
    else:
        assert '"model' in done.stdout


def test_the_python_example(url, folder, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", SERVICE, re.S)
    names: dict = {}
    exec(compile(example.replace(ADDRESS, url), README.name, "exec"), names)  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [found.class_name for found in names["many"][0]]
    assert any(line.startswith("7 ") and ">= 0.89999" in line for line in printed)
    assert len(names["many"]) == 2
    assert len(names["preview"].detections) > 3
    assert [one["name"] for one in names["evidence"]] == CLASSES


def test_the_page_is_as_small_as_it_says():
    (told,) = re.findall(r"The page is (\d+) kB", SERVICE)
    static = README.parent / "service" / "static"
    assert sum(path.stat().st_size for path in static.iterdir()) <= int(told) * 1000
