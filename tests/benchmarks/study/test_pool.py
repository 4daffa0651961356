"""Real processes: results, errors, deaths and interruptions."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.result_file import read
from benchmarks.study.pool import Failure, work_off

ROOT = Path(__file__).parents[3]
# A module of its own, because the processes of a pool import the work by its name.
WORK = """
import os, tempfile, time
import torch

def work(word):
    if word == "bad":
        raise ValueError("two\\nlines")
    if word == "dead":
        os._exit(9)
    if word == "spoil":
        os.environ["SPOILT"] = "1"
    if "SPOILT" in os.environ:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return word.upper(), os.getpid(), torch.get_num_threads()

def train(run):
    if run.method == "slow":
        with tempfile.TemporaryDirectory() as folder:
            print("slow", os.getpid(), folder, flush=True)
            time.sleep(600)  # a long training, which the test ends
    return {**run.head(), "ap": 0.5}
"""
STUDY = """
import signal, sys
if __name__ == "__main__":
    # What a shell starts in its background ignores Ctrl-C, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from benchmarks.study.__main__ import main
    from study_work import train
    sys.exit(main(sys.argv[1:], train))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "study_work.py").write_text(WORK)
    (tmp_path / "study.py").write_text(STUDY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "study_work", raising=False)
    return tmp_path


def test_each_item_comes_back_and_one_that_fails_costs_no_other(folder):
    from study_work import work

    items = iter(["good", "bad", "dead", "fine", "last"])
    threads = torch.get_num_threads() + 1
    results = dict(work_off(work, lambda: next(items, None), 2, threads))
    assert sorted(results) == ["bad", "dead", "fine", "good", "last"]
    assert results["bad"] == Failure("ValueError: two lines (study_work.py:7)")
    assert results["dead"] == Failure("the process ended with exit code 9")
    sound = [results[word] for word in ("good", "fine", "last")]
    assert [word for word, _, _ in sound] == ["GOOD", "FINE", "LAST"]
    assert {used for _, _, used in sound} == {threads}
    processes = {process for _, process, _ in sound}
    assert os.getpid() not in processes
    for process in processes:  # none is left
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_ctrl_c_leaves_whole_lines_and_nothing_else(folder, place):
    place.add("a", "good, slow, fine")
    study = subprocess.Popen(
        [sys.executable, "study.py", place.path, "--out", place.out, "--jobs", "1"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    begun = next(line for line in study.stdout if line.startswith("slow"))
    os.killpg(study.pid, signal.SIGINT)  # as a terminal does: every process hears of it
    _, said = study.communicate(timeout=120)  # rather than for ever
    assert study.returncode == 130
    assert said.strip() == "stopped; the next call goes on from here"
    assert [(row["method"], row["ap"]) for row in read(place.out)] == [("good", 0.5)]
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.split()[1]), 0)
    assert not Path(begun.split()[2]).exists()  # it ended in order, and was not killed
