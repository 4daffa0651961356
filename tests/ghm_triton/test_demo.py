import subprocess
import sys

import pytest
from PIL import Image

from export.file import read_detector

DATA = "digits:images=200,held_out_images=12"
pytestmark = pytest.mark.slow

PICTURES = ("held_out.png", "detections.png", "gradient_norms.png", "thresholds.png")


def demo(folder, *words):
    command = [sys.executable, "-m", "ghm_triton.cli", "demo", "--out", folder, "--data", DATA]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=240)


def test_the_demo_trains_exports_and_serves(tmp_path):
    """The command with little data, over an earlier run: every step is a process of its own."""
    (tmp_path / "checkpoint.pt").write_bytes(b"an earlier run")
    done = demo(tmp_path, "--steps", "25", "--policy", "prior")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ghm ")]
    assert steps == ["train", "eval", "thresholds", "export", "verify", "serve"]
    assert "the file does what the checkpoint does" in done.stdout
    assert '"threshold": ' in done.stdout
    for name in PICTURES:
        with Image.open(tmp_path / name) as picture:
            picture.load()
    assert read_detector(tmp_path / "detector.onnx").card.training.steps == 25


def test_a_step_that_fails_stops_the_demo_there(tmp_path):
    done = demo(tmp_path, "--steps", "0")
    assert done.returncode == 2
    assert "ghm export" not in done.stdout
    assert "`ghm train` ended with exit code 2" in done.stderr
