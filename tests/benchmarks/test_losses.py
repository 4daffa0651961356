"""The benchmark of the losses runs, agrees with itself and says where its numbers come from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def test_a_quick_run_on_the_cpu(tmp_path):
    out = tmp_path / "deep" / "losses.jsonl"
    done = run("benchmarks.losses", "--device", "cpu", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    seen = {(row["task"], row["dtype"], row["target"], row["loss"], row["stage"]) for row in rows}
    assert len(seen) == len(rows)
    for dtype in ("float32", "bfloat16"):
        for each in ("forward", "forward+backward"):
            for target in ("index", "dense"):
                for loss in ("ghm_c torch", "ghm_c released", "focal", "focal torchvision", "bce"):
                    assert ("classification", dtype, target, loss, each) in seen
            for loss in ("ghm_r torch", "ghm_r released", "smooth_l1"):
                assert ("regression", dtype, "dense", loss, each) in seen
    for row in rows:
        assert row["median_ms"] > 0
        assert row["entries"] == 20_000
        assert row["device"] == "cpu"
        assert row["commit"]
        assert row["versions"]["torch"]
        assert "gpu" in row
    # The table on the terminal has a line a loss, and plain cross entropy is once itself.
    assert done.stdout.count("bce") == 4
    assert [line.split()[-1] for line in done.stdout.splitlines() if " bce " in line] == [
        "1.00"
    ] * 4

    # Ours, set up as released, gives what the released algorithm gives: the peer is the real one.
    values = {
        (row["task"], row["dtype"], row["target"], row["loss"]): row["value"]
        for row in rows
        if row["stage"] == "forward"
    }
    for (task, dtype, target, loss), value in values.items():
        if loss in ("ghm_c torch", "ghm_r torch"):
            peer = values[task, dtype, target, loss.replace("torch", "released")]
            # In bfloat16 the peer's own arithmetic is: 2^-8 an operation, three of them.
            assert value == pytest.approx(peer, rel=1e-5 if dtype == "float32" else 0.05)
        if loss == "focal":
            peer = values[task, dtype, target, "focal torchvision"]
            assert value == pytest.approx(peer, rel=1e-5 if dtype == "float32" else 0.05)


def test_the_gpu_script_says_when_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    environment["PYTHON"] = sys.executable
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
