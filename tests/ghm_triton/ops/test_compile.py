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


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_it_compiles_and_does_not_spill(tmp_path, target):
    # In a process of its own: this one may interpret. With an empty cache: it must compile.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.resources", "--targets", target]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
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
