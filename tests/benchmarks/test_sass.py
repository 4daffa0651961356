"""Every kernel compiles for absent GPUs, spills nothing and is no worse than the baseline."""

import importlib
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import ghm_triton.ops
from benchmarks.costs import Costs
from benchmarks.kernels import TARGETS
from benchmarks.sass import (
    BASELINE,
    DTYPES,
    check,
    compare,
    incomparable,
    parse,
    read,
    table,
    update,
    write,
)

ROOT = Path(__file__).parents[2]
# A hundred compilations: three quarters of a minute on two idle cores, more where others work too.
pytestmark = pytest.mark.timeout(900)


def start(cache, *arguments):
    """Start a process, as this one may interpret, with an empty cache, so that it compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.sass", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        cwd=ROOT,
    )


HALVES = (("sm_80", "gfx942"), ("sm_90", "sm_100"))  # of the work


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Measure every kernel on every target, in two processes."""
    folder = tmp_path_factory.mktemp("sass")
    running = []
    for targets in HALVES:
        written = folder / f"{targets[0]}.jsonl"
        command = ("--targets", *targets, "--update", "--baseline", written)
        running.append((targets, start(written.with_suffix(""), *command), written))
    found = {}
    for targets, process, written in running:
        _, complaint = process.communicate()
        found |= dict.fromkeys(targets, (process.returncode, complaint, written))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_got_worse(reports, target):
    status, complaint, written = reports[target]
    assert status == 0, complaint
    rows = [row for row in read(written).values() if row.target == target]
    baseline = read(BASELINE)
    # Said aloud: of other compilers than the baseline's only spills and widths are compared.
    assert check(rows, baseline, whole=True) == [], incomparable(rows, baseline)


def test_every_kernel_is_measured(reports):
    """Compare with everything named `..._kernel` in the kernels' modules."""
    modules = pkgutil.iter_modules(ghm_triton.ops.__path__, "ghm_triton.ops.")
    names = {
        name
        for module in modules
        for name in vars(importlib.import_module(module.name))
        if name.endswith("_kernel")
    }
    *_, written = reports["sm_90"]
    assert {kernel.split(".")[0] for kernel, _ in read(written)} == names


ROW = Costs("sum_partials_kernel", "sm_90", "triton 0.1", 8, 0, 64, 0)


def test_the_command_fails_and_names_what_got_worse(tmp_path, reports):
    *_, written = reports["sm_90"]
    found = read(written)["sum_partials_kernel", "sm_90"]
    baseline = tmp_path / "baseline.jsonl"
    write(baseline, [replace(found, registers=8)])
    only = ("--targets", "sm_90", "--kernels", "sum_partials")
    process = start(written.with_suffix(""), *only, "--check", "--baseline", baseline)
    printed, complaint = process.communicate()
    assert process.returncode == 1
    expected = f"sum_partials_kernel on sm_90: registers rose from 8 to {found.registers}\n"
    assert complaint.startswith(expected)
    assert "sum_partials_kernel" in printed


@pytest.fixture
def options(tmp_path):
    """Options of a check of everything against a baseline of one row."""
    path = tmp_path / "baseline.jsonl"
    write(path, [ROW])
    return parse(["--check", "--baseline", str(path)])


def test_a_kernel_that_is_gone_is_named(options, capsys):
    other = replace(ROW, kernel="old_kernel")
    elsewhere = replace(other, target="sm_80")  # not asked for
    write(options.baseline, [elsewhere, ROW, other])
    assert compare([ROW], options) == 1
    said, *_ = capsys.readouterr().err.splitlines()
    assert said == "old_kernel on sm_90 is only in the baseline"
    options.kernels = ["sum_partials"]
    assert compare([ROW], options) == 0


def test_an_update_replaces_what_was_measured_and_drops_what_is_gone(options):
    other, elsewhere = replace(ROW, kernel="old_kernel"), replace(ROW, target="sm_80")
    write(options.baseline, [ROW, other, elsewhere])
    new = replace(ROW, registers=9)
    options.targets, options.kernels = ["sm_90"], ["sum_partials"]
    update([new], options)
    assert list(read(options.baseline).values()) == [elsewhere, other, new]
    options.kernels = None
    update([new], options)
    assert list(read(options.baseline).values()) == [elsewhere, new]


def test_the_table_shows_what_binds():
    row = Costs(
        *("count_bce_kernel.index.fp32", "sm_90", "triton 0.1", 40, 0, 128, 100),
        *(4.0, 8.0, 20.0, 2.0, 1.0, {"16": 2, "8": 2}, {}),
    )
    half = replace(row, kernel="count_bce_kernel.index.bf16", moved=2.0, stores={"4": 1})
    header, _, *shown = table(
        [half, ROW, row, replace(row, target="sm_80", registers=99)]
    ).splitlines()
    assert header.startswith(
        "| kernel | instructions | special functions | bytes per load, per store |"
    )
    expected = "| count_bce index | 20.0 | 3.0 | 16 / 16, 4 | 40 | 750 / 1500 | 1436 | 1197 "
    assert shown == [expected + "| memory / special |"]


AIMS = {"count_bce_kernel.index": 25, "count_asl1_kernel": 25}
AIMS |= dict.fromkeys(("bce_kernel.index", "bce_kernel.dense", "asl1_kernel"), 45)


@pytest.mark.parametrize("kernel", AIMS)
def test_on_sm_90_few_instructions_suffice(kernel):
    baseline = read(BASELINE)
    for dtype in DTYPES:
        assert baseline[f"{kernel}.{dtype}", "sm_90"].instructions <= AIMS[kernel]


def test_the_readme_shows_the_baseline():
    assert table(read(BASELINE).values()) in (ROOT / "README.md").read_text()
