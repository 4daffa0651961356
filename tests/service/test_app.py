import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from export.card import CardError
from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.engine.session import ModelError

ROOT = Path(__file__).parents[2]


def test_importing_the_service_pulls_in_no_torch():
    code = (
        "import sys, service.app, service.cli\n"
        "heavy = {'torch', 'torchvision', 'triton'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_command_alone_imports_nothing_heavy():
    code = (
        "import sys, service.cli\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'fastapi', 'pydantic', 'PIL', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_settings_come_from_the_environment(monkeypatch, detector):
    monkeypatch.setenv("GHM_MODEL", str(detector))
    assert create_app().state.service.settings.model == detector


def test_without_settings_and_environment(monkeypatch):
    monkeypatch.delenv("GHM_MODEL", raising=False)
    with pytest.raises(SettingsError, match="GHM_MODEL"):
        create_app()


def test_requests_at_once_get_their_own_answers(client, encode, scene):
    from concurrent.futures import ThreadPoolExecutor

    def ask(place: int) -> list[float]:
        box = (16 * place, 16, 16 * place + 16, 32)
        content = encode(scene(96, 64, {box: "#ff0000"}))
        (found,) = client.post("/v1/detect", content=content).json()["detections"]
        return found["box"]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, [0, 1, 2, 3, 4, 5] * 4))
    assert answers == [[16 * p, 16, 16 * p + 16, 32] for p in [0, 1, 2, 3, 4, 5] * 4]


@pytest.mark.parametrize(
    ("content", "provider", "error", "message"),
    [
        (None, "cpu", FileNotFoundError, "none.onnx"),
        (b"not a model", "cpu", CardError, "none.onnx"),
        ("detector", "cuda", ModelError, "cuda does not work here"),
    ],
)
def test_the_start_fails(tmp_path, detector, monkeypatch, content, provider, error, message):
    path = tmp_path / "none.onnx"
    if content is not None:
        path.write_bytes(detector.read_bytes() if content == "detector" else content)
    monkeypatch.setattr("service.engine.session._has_cuda_device", lambda: False)
    app = create_app(Settings(model=path, provider=provider))
    with pytest.raises(error, match=message), TestClient(app):
        pass
