"""Finished trainings are recognised by their key, in any section of a grid."""

import pytest

from benchmarks.result_file import read
from benchmarks.study.ledger import MARGIN, BusyError, Ledger, lookup
from benchmarks.study.plan import Run

HERE = {"cpu": "c", "gpu": None, "commit": "0"}


def row_of(run, **more):
    return {**run.head(), "ap": 0.5, "total_seconds": 30.0, "cpu": "c", "gpu": None, **more}


def test_a_row_for_each_place_that_wants_it_and_none_twice(place):
    good, copy, elsewhere = place.add("a", "good, copy").add("b", "good").runs()
    with Ledger(place.out, HERE) as ledger:
        assert ledger.found(good) is None
        ledger.settle([good, copy], row_of(good))
        ledger.settle([good, copy, elsewhere], row_of(good))
    with Ledger(place.out, HERE) as ledger:
        found = ledger.found(elsewhere)
        ledger.settle([good, copy, elsewhere], found)
    places = [(row["section"], row["method"]) for row in read(place.out)]
    assert places == [("a", "good"), ("a", "copy"), ("b", "good")]
    assert {row["ap"] for row in read(place.out)} == {0.5}


def test_a_recipe_that_is_wanted_again_stands_last_in_its_place(place, monkeypatch):
    (good,) = place.add("a", "good").runs()
    recipe = good.recipe()
    for now, ap in ((recipe, 0.5), ("other", 0.75), (recipe, None), (recipe, None)):
        monkeypatch.setattr(Run, "recipe", lambda _, now=now: now)
        with Ledger(place.out, HERE) as ledger:
            found = ledger.found(good)
            assert bool(found) == (ap is None)
            ledger.settle([good], found or row_of(good, ap=ap))
    assert [row["ap"] for row in read(place.out)] == [0.5, 0.75, 0.5]


def test_another_run_is_not_found(place):
    good, *others = place.add("a", "good, fine", "[0, 1]").add("b", "good", steps=9).runs()
    with Ledger(place.out, HERE) as ledger:
        ledger.settle([good], row_of(good))
        assert ledger.found(good)
        assert [ledger.found(run) for run in others] == [None] * 4
        place.path.rename(place.folder / "other.yaml")
        place.path = place.folder / "other.yaml"
        assert ledger.found(place.runs()[0]) is None  # another grid's: another machine's, maybe


def test_what_failed_is_not_done(place):
    good, bad = place.add("a", "good, bad").runs()
    with Ledger(place.out, HERE) as ledger:
        ledger.fail([good, bad], "ValueError: no", {"commit": "0"})
    with Ledger(place.out, HERE) as ledger:
        assert ledger.found(good) is ledger.found(bad) is None
        ledger.settle([good], row_of(good))
        assert ledger.found(good)["ap"] == 0.5
    failed = read(place.out)[0]
    assert failed == {**good.head(), "error": "ValueError: no", "commit": "0"}
    assert lookup(read(place.out), good)["ap"] == 0.5  # the last line counts


def test_an_estimate_is_by_the_step_and_of_this_machine(place):
    short, long = place.add("a", "good", steps=10).add("b", "good", steps=40).runs()
    with Ledger(place.out, HERE) as ledger:
        assert ledger.estimate(short) == 0
        ledger.settle([short], row_of(short, total_seconds=1000.0, cpu="another"))
        assert ledger.estimate(short) == 0
        ledger.settle([long], row_of(long, total_seconds=80.0))
        assert ledger.estimate(long) == pytest.approx(MARGIN * 80)
        assert ledger.estimate(short) == pytest.approx(MARGIN * 20)


def test_a_file_has_one_writer(place):
    with Ledger(place.out, HERE), pytest.raises(BusyError, match=r"writing to .*out\.jsonl"):
        Ledger(place.out, HERE)
    Ledger(place.out, HERE).__exit__(None, None, None)
