"""Kind 10: a checkpoint that is none ends `ghm export` in one sentence, without a traceback."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghm_triton.detection.models.config import DetectorConfig
from tests.attack.core import ENVIRONMENT, PATIENCE, ROOT, cases
from tests.export.conftest import save_checkpoint

# Exports each checkpoint in one process, since importing torch takes longer than all of them.
SCRIPT = """
import contextlib, io, json, resource, signal, sys
import torch
from ghm_triton.cli import main
def late(*_):
    raise BaseException("it did not end in time")
signal.signal(signal.SIGALRM, late)
status = open("/proc/self/status").read()
size = int(status.partition("VmSize:")[2].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
ends = {}
for path in sys.argv[1:]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        signal.alarm(20)
        try:
            status = main(["export", path, "--out", path + ".onnx"])
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)[:200]
        signal.alarm(0)
    ends[path] = status, said.getvalue()
print(json.dumps(ends))
"""


def without(key: str):
    return lambda content: content.pop(key)


def sets(*path: str, value: object):
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def sets_all(key: str, value: object):
    return lambda content: content[key].update(dict.fromkeys(content[key], value))


SHAPES = {
    "no version": without("format_version"),
    "version of text": sets("format_version", value="1"),
    "version of the future": sets("format_version", value=10**9),
    "negative version": sets("format_version", value=-1),
    "version that is a list": sets("format_version", value=[1]),
    "no configuration": without("config"),
    "configuration that is a list": sets("config", value=[1, 2]),
    "empty configuration": sets("config", value={}),
    "unknown field": sets("config", "surprise", value=1),
    "unknown backbone": sets("config", "backbone", value="resnet9999"),
    "backbone that is a number": sets("config", "backbone", value=7),
    "unknown architecture": sets("config", "architecture", value="yolo"),
    "size of 10^9 pixels": sets("config", "image_size", value=(10**9, 10**9)),
    "size of text": sets("config", "image_size", value="64x64"),
    "negative size": sets("config", "image_size", value=(-64, -64)),
    "10^9 channels": sets("config", "channels", value=8 * 10**8),
    "no classes": sets("config", "class_names", value=()),
    "class of a number": sets("config", "class_names", value=(1, 2)),
    "more classes than weights": sets("config", "class_names", value=("a", "b", "c", "d")),
    "no statistics": without("statistics"),
    "statistics that are a list": sets("statistics", value=[]),
    "10^30 anchors": sets("statistics", "anchors", value=10**30),
    "statistics of text": sets_all("statistics", "x"),
    "no weights": without("model"),
    "weights that are text": sets("model", value="weights"),
    "weights of text": sets_all("model", "x"),
    "no training": without("training"),
    "training that is a list": sets("training", value=[]),
}
FILES = {
    "text": b"no checkpoint\n" * 100,
    "empty file": b"",
    "pickle": pickle.dumps({"format": "ghm-triton checkpoint"}),
    "pickle that runs a command": b"cos\nsystem\n(S'touch pwned'\ntR.",
    "archive without an end": b"PK\x03\x04" + bytes(1000),
}


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[object, str]]:
    """How the export of each ends."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = DetectorConfig(("a", "b", "c"), (64, 64), channels=8, head_convs=1)
    honest = save_checkpoint(folder / "honest.pt", config)
    names = {}
    for index, (name, shape) in enumerate((SHAPES | FILES).items()):
        path = folder / f"{index}.pt"
        if isinstance(shape, bytes):
            path.write_bytes(shape)
        else:
            content = torch.load(honest, weights_only=True)
            shape(content)
            torch.save(content, path)
        names[str(path)] = name
    paths = [*names, str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *paths],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=True,
    )
    assert not Path(folder / "pwned").exists()
    results = json.loads(done.stdout.splitlines()[-1])
    return {names.get(path, "folder"): end for path, end in results.items()}


NAMES = [*SHAPES, *FILES, "folder"]


@pytest.mark.parametrize("name", cases(10, {name: name for name in NAMES}))
def test_a_checkpoint_that_is_none_ends_in_a_sentence(ends, name):
    status, said = ends[name]
    assert status in (1, 2), (status, said)
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
