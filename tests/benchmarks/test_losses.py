"""The benchmark of the losses: a quick run, resuming, time limits and failures."""

import sys
from types import SimpleNamespace

import pytest

from benchmarks import losses
from benchmarks.loss_cases import Case
from benchmarks.measure import Settings
from benchmarks.result_file import BOTH, Rows, read

ORIGIN = {"device": "cpu", "gpu": None, "cpu": "this", "source": "abc"}
SETTINGS = Settings(0.001, 1, None)
CASES = [Case("classification", size, "float32", "index", "cpu") for size in (100, 200, 300)]


def test_a_quick_run_on_the_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "losses.jsonl"
    here = losses.provenance()  # the code may change while this runs; not here
    monkeypatch.setattr(losses, "provenance", lambda: here)
    # At this size only the plain losses are compiled: compiling takes all the time.
    options = ["--quick", "--sizes", "2000", "--dtypes", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["losses", "--device", "cpu", *options])
    losses.main()
    rows = read(out)
    assert not [row for row in rows if "error" in row]
    seen = {(row.get("task"), row.get("target"), row["loss"], row["stage"]) for row in rows}
    assert len(seen) == len(rows)
    assert (None, None, "copy", "roof") in seen
    for loss in ("ghm_c torch", "ghm_c released", "bce", "bce compiled"):
        for target in ("index", "dense"):
            assert ("classification", target, loss, BOTH) in seen
    for loss in ("ghm_r torch", "ghm_r released", "smooth_l1 compiled"):
        assert ("regression", "dense", loss, BOTH) in seen
    for row in rows:
        assert row["device"] == "cpu"
        assert row["compiler"] == "aot_eager"
        assert row["commit"]
        assert row["source"]
        assert row["versions"]["torch"]
        assert "gpu" in row
    shown = capsys.readouterr().out
    assert "classification, 2000 entries, float32, index targets" in shown
    # Plain cross entropy is once itself.
    plain = [line.split() for line in shown.splitlines() if line.split()[:1] == ["bce"]]
    assert [words[3:6] for words in plain if words[2] == "ms"] == [["1.00", "x", "bce"]] * 2

    losses.main()  # again: all is there
    assert read(out) == rows
    assert capsys.readouterr().out == ""


@pytest.fixture
def measured(monkeypatch):
    """Make measuring a case take `takes` seconds of a fake clock."""
    state = SimpleNamespace(now=0.0, cases=[], skipped=[], takes=dict.fromkeys((100, 200, 300), 1))

    def measure(case, settings, roof, skip):
        state.cases.append(case.entries)
        state.skipped.append(skip)
        state.now += state.takes[case.entries]
        yield {**case.key, "loss": "bce", "stage": BOTH, "median_ms": 1.0, "ratios": {}}

    monkeypatch.setattr(losses, "measure", measure)
    monkeypatch.setattr(losses, "copy_rate", lambda *_: 5.0)
    monkeypatch.setattr(losses.time, "monotonic", lambda: state.now)
    return state


def test_it_goes_on_where_it_stopped(tmp_path, measured):
    path = tmp_path / "rows.jsonl"
    losses.run(CASES[:2], SETTINGS, Rows(path, ORIGIN), limit=100)
    assert measured.cases == [100, 200]
    losses.run(CASES, SETTINGS, Rows(path, ORIGIN), limit=100)
    assert measured.cases == [100, 200, 300]
    losses.run(CASES, SETTINGS, Rows(path, {**ORIGIN, "source": "new"}), limit=100)
    assert measured.cases[3:] == [100, 200, 300]
    losses.run(CASES[:1], SETTINGS, Rows(path, ORIGIN), limit=100, again=True)
    assert measured.cases[6:] == [100]
    roofs = [row for row in read(path) if row["stage"] == "roof"]
    assert [row["gb_per_s"] for row in roofs] == [5.0] * 4  # once a run that measures


def test_a_spoiled_device_ends_the_process_and_the_next_leaves_out_who_spoiled_it(
    tmp_path, measured, monkeypatch
):
    path = tmp_path / "rows.jsonl"

    def spoil(case, settings, roof, skip):
        yield {**case.key, "loss": "bad", "stage": BOTH, "failed_in": "first", "error": "E: ill"}
        yield {**case.key, "loss": "good", "stage": BOTH, "failed_in": "first", "error": "E: ill"}

    with monkeypatch.context() as patch:
        patch.setattr(losses, "measure", spoil)
        patch.setattr(losses, "device_is_well", lambda _: False)
        with pytest.raises(SystemExit) as stopped:
            losses.run(CASES[:1], SETTINGS, Rows(path, ORIGIN), limit=100)
    assert stopped.value.code == losses.SPOILED == 75
    # What failed after it failed because of it, and is not blamed.
    assert [row["loss"] for row in read(path) if "error" in row] == ["bad"]
    losses.run(CASES[:1], SETTINGS, Rows(path, ORIGIN), limit=100)
    assert measured.skipped == [{"bad"}]
    losses.run(CASES[:1], SETTINGS, Rows(path, ORIGIN), limit=100, again=True)
    assert measured.skipped == [{"bad"}, set()]
