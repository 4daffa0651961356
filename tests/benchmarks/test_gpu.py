"""The script for a GPU: every stage runs, whatever the result of the previous one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
# In Python's place: notes what it is asked to run, and fails as told.
STAND_IN = """#!/usr/bin/env bash
case "$1" in
  -) cat >/dev/null; exit 0 ;;
  -c) exit 1 ;;
esac
module=$2
echo "$*" >>"$NOTES"
count=$(grep -c -- "-m $module" "$NOTES")
for rule in $RULES; do
  IFS=: read -r name nth status <<<"$rule"
  if [ "$module" = "$name" ] && { [ "$nth" = "$count" ] || [ "$nth" = all ]; }; then
    exit "$status"
  fi
done
"""
STAGES = ["pytest", "repeat", "losses", "step", "plot_losses", "claims"]


@pytest.fixture
def run(tmp_path):
    """Run the script with the stand-in; return its output and the commands it ran."""

    def run_with(rules="", *words, **environment):
        python = tmp_path / "python"
        python.write_text(STAND_IN)
        python.chmod(0o755)
        notes = tmp_path / "notes"
        notes.write_text("")
        given = {"OUT": str(tmp_path / "out"), "PYTHON": str(python), "NOTES": str(notes)}
        done = subprocess.run(
            ["bash", SCRIPT, *words],
            capture_output=True,
            text=True,
            env={**os.environ, **given, "RULES": rules, **environment},
        )
        return done, [line.split() for line in notes.read_text().splitlines()]

    return run_with


def modules(ran):
    return [words[1].removeprefix("benchmarks.") for words in ran]


def test_it_says_when_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    environment["PYTHON"] = sys.executable
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_all_stages_in_order(run):
    done, ran = run()
    assert done.returncode == 0, done.stderr
    assert modules(ran) == STAGES
    assert done.stdout.count(": passed after") == len(STAGES)
    for words in ran[1:4]:
        assert words[words.index("--device") + 1] == "cuda"


def test_what_fails_is_noted_and_the_rest_goes_on(run):
    rules = " ".join(f"{name}:all:3" for name in ("pytest", *("benchmarks." + s for s in STAGES)))
    done, ran = run(rules)
    assert done.returncode == 1
    assert modules(ran) == STAGES
    assert done.stdout.count("FAILED (3)") == len(STAGES)
    done, _ = run("benchmarks.repeat:all:124")
    assert done.returncode == 1
    assert "repeat: OUT OF TIME" in done.stdout


def test_a_spoiled_device_gets_a_new_process(run):
    done, ran = run("benchmarks.losses:1:75 benchmarks.losses:2:75")
    assert modules(ran).count("losses") == 3
    assert modules(ran)[-1] == "claims"
    done, ran = run("benchmarks.losses:all:75")
    assert modules(ran).count("losses") == 4
    assert done.returncode == 1


def test_the_study_ends_in_time_and_goes_on_from_what_there_is(run, tmp_path):
    out = tmp_path / "out" / "study.jsonl"
    out.parent.mkdir()
    out.write_text("earlier\n")
    done, (words,) = run("", "train", "--only", "bins")
    assert done.returncode == 0, done.stderr
    assert words[:2] == ["-m", "benchmarks.study"]
    assert (ROOT / words[2]).is_file()
    assert words[words.index("--out") + 1] == str(out)
    assert int(words[words.index("--seconds") + 1]) < 465 < 8 * 60
    assert words[-2:] == ["--only", "bins"]
    assert out.read_text() == "earlier\n"
    done, _ = run("benchmarks.study:1:1", "train")
    assert done.returncode == 1
