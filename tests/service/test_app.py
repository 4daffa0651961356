import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from export.card import CardError
from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.engine.session import ModelError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("service.app, service.cli", {"torch", "torchvision", "triton"}),
        ("service.cli", {"torch", "onnx", "onnxruntime", "fastapi", "pydantic", "PIL", "numpy"}),
    ],
)
def test_imports_pull_in_nothing_heavy(modules, heavy):
    code = f"import sys, {modules}\nprint({heavy} & {{n.partition('.')[0] for n in sys.modules}})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_settings_come_from_the_environment(monkeypatch, detector):
    monkeypatch.setenv("GHM_MODEL", str(detector))
    assert create_app().state.service.settings.model == detector
    monkeypatch.delenv("GHM_MODEL")
    with pytest.raises(SettingsError, match="GHM_MODEL"):
        create_app()


def test_requests_at_once_get_their_own_answers(client, encode, scene):
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
