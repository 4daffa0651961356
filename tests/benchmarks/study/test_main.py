"""The command: resuming, failures, interruptions and time limits."""

import os
import signal

import pytest

import benchmarks.study.__main__ as command
from benchmarks.provenance import provenance
from benchmarks.result_file import read
from benchmarks.study.__main__ import cores, main
from benchmarks.study.ledger import Ledger
from benchmarks.study.pool import Failure

BAD = "ValueError: not today"


@pytest.fixture
def worked(monkeypatch):
    """Collect the methods worked on, in this process; see test_pool.py for others."""
    methods = []

    def work_off(work, following, workers, threads):
        assert workers * threads <= max(workers, cores())
        while (run := following()) is not None:
            methods.append(run.method)
            yield run, work(run)

    monkeypatch.setattr(command, "work_off", work_off)
    return methods


def work(run):
    if run.method == "bad":
        return Failure(BAD)
    if run.method == "slow":
        os.kill(os.getpid(), signal.SIGTERM)
    took = float(run.options.steps)  # a second a step
    return {**run.head(), "ap": 0.5, "seconds": took, "total_seconds": took, "commit": "c"}


def outcomes(place):
    return [(x["section"], x["method"], x.get("ap", x.get("error"))) for x in read(place.out)]


def test_what_fails_is_recorded_and_tried_again_and_the_rest_is_done_once(place, worked, capsys):
    place.add("a", "good, bad, fine").add("b", "copy, fine")
    words = [str(place.path), "--out", str(place.out), "--jobs", "2"]
    assert main(words, work) == 1
    assert worked == ["good", "bad", "fine"]
    assert outcomes(place) == [
        ("a", "good", 0.5),
        ("b", "copy", 0.5),
        ("a", "bad", BAD),
        ("a", "fine", 0.5),
        ("b", "fine", 0.5),
    ]
    assert [row.get("parallel") for row in read(place.out)] == [2, 2, None, 2, 2]
    assert all("commit" in row for row in read(place.out))
    said = capsys.readouterr().out
    assert "3 to train, 2 at a time" in said
    assert "[1/3] a · digits · retinanet · good · seed 0, 10 steps: AP 0.500 in 10.0 s; 2 l" in said
    assert f"FAILED: {BAD}; 1 left" in said

    assert main([*words, "--only", "b"], work) == 0  # nothing failed there
    assert main(words, work) == 1
    assert worked[3:] == ["bad"]
    assert main([*words, "--list"], work) == 0
    said = capsys.readouterr().out
    assert "failed    a · digits · retinanet · bad" in said
    assert "AP 0.500  a · digits · retinanet · good · seed 0, 10 steps; also b · copy" in said
    assert said.endswith("2 of 3 done\n")
    assert main([*words, "--again"], work) == 1
    assert worked[4:] == ["good", "bad", "fine"]


def test_it_can_be_ended_and_goes_on_from_there(place, worked, capsys):
    before = signal.getsignal(signal.SIGTERM)
    place.add("a", "good, slow, fine")
    words = [str(place.path), "--out", str(place.out)]
    assert main(words, work) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert outcomes(place) == [("a", "good", 0.5)]
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(words, lambda run: {**run.head(), "ap": 0.75}) == 0
    assert worked == ["good", "slow", "slow", "fine"]


def test_what_never_fits_is_named(place, worked, capsys):
    done, _, _ = place.add("a", "good, fine", steps=100).add("b", "fine", steps=50).runs()
    words = [str(place.path), "--out", str(place.out)]
    here = provenance()
    with Ledger(place.out, here) as ledger:
        ledger.settle([done], {**work(done), **here})
    assert main([*words, "--seconds", "90"], work) == 0  # something was trained
    assert main([*words, "--seconds", "90"], work) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        "a · digits · retinanet · fine · seed 0, 100 steps cannot fit into 90 s:"
        " it takes about 120 s"
    )
    assert not any("call again" in line for line in said)
    assert [row["section"] for row in read(place.out)] == ["a", "b"]


def test_mistakes_are_told_without_a_traceback(place, capsys):
    place.add("a", "good")
    assert main([str(place.folder / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main([str(place.path), "--only", "z"]) == 2
    assert "unknown section 'z'" in capsys.readouterr().err
    with Ledger(place.out, {}):
        assert main([str(place.path), "--out", str(place.out)]) == 2
    assert "another study is writing" in capsys.readouterr().err
    place.out.write_text("no row\n")
    assert main([str(place.path), "--out", str(place.out)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        main([str(place.path), "--jobs", "0"])
