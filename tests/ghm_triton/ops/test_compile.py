"""Every kernel compiles for GPUs that are not here, and spills nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LOSSES = {
    "count_bce_kernel",
    "bce_forward_kernel",
    "bce_backward_kernel",
    "count_asl1_kernel",
    "asl1_forward_kernel",
    "asl1_backward_kernel",
}


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All targets at once, each in a process of its own: this one may interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    running = {}
    for target in TARGETS:
        # An empty cache: it must compile.
        environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp(target))
        command = [sys.executable, "-m", "benchmarks.resources", "--targets", target]
        running[target] = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment.copy(),
            cwd=ROOT,
        )
    return {target: (*process.communicate(), process) for target, process in running.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_it_compiles_and_does_not_spill(reports, target):
    printed, complaint, process = reports[target]
    assert process.returncode == 0, complaint
    rows = [json.loads(line) for line in printed.splitlines()]
    compiled = {(row["kernel"], row["variant"], row["dtype"]) for row in rows}
    for dtype in ("fp32", "bf16"):
        kernels = {kernel for kernel, _, of in compiled if of == dtype}
        assert kernels == LOSSES
        for kernel in ("count_bce_kernel", "bce_forward_kernel", "bce_backward_kernel"):
            assert {(kernel, kind, dtype) for kind in ("index", "dense")} <= compiled
    for ema in ("debiased", "mmdet"):
        assert ("density_kernel", ema, "") in compiled
    for row in rows:
        assert row["binary_bytes"] > 1000, row
        assert row["registers"] > 0, row
        assert row["spilled_bytes"] == 0, row
