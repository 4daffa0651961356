"""Timing: order of calls, statistics of times, and failures."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Timing, input_sets, race


@pytest.fixture
def clock(monkeypatch):
    """Use a fake clock that only work moves; in seconds."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now.seconds)
    return now


def test_median_spread_and_calls():
    taken = Timing(((1.0, 2.0, 3.0), (4.0, 5.0), (6.0, 7.0, 8.0, 9.0, 10.0)))
    assert taken.median == 5.5
    assert taken.quantile(0.2) == 2.0
    assert taken.quantile(0.8) == 8.0
    assert (taken.quantile(0.0), taken.quantile(1.0)) == (1.0, 10.0)
    assert taken.shared(2).calls == [0.5 * ms for ms in range(1, 11)]


def test_ratios_compare_turn_with_turn():
    """Noise of a whole round affects both contenders and cancels in the ratio."""
    mine = Timing(((2.0, 2.0, 90.0), (40.0,), (2.0, 70.0, 2.0)))
    theirs = Timing(((1.0,), (20.0, 20.0, 99.0), (1.0, 1.0)))
    assert mine.ratio(theirs) == 2.0
    assert theirs.ratio(mine) == 0.5
    with pytest.raises(ValueError, match="zip"):
        mine.ratio(Timing(((1.0,),)))


def test_contenders_take_turns(clock):
    called = []

    def work(name, ms):
        def run():
            called.append(name)
            clock.seconds += ms / 1000

        return run

    contenders = {"quick": work("quick", 1.0), "slow": work("slow", 100.0)}
    timings, errors = race(contenders, "cpu", seconds=0.012, rounds=3)
    assert not errors
    warm = ["quick"] * 2 + ["slow"] * 2  # a first call, and an estimate
    assert called == warm + (["quick"] * 4 + ["slow"]) * 3
    assert timings["quick"].rounds == (pytest.approx((1.0,) * 4),) * 3
    assert timings["slow"].median == pytest.approx(100.0)


@pytest.mark.parametrize("call", [1, 2, 3, 5])
def test_who_fails_is_out_and_the_others_go_on(clock, call):
    calls = 0

    def work():
        clock.seconds += 1.0

    def fail():
        nonlocal calls
        calls += 1
        clock.seconds += 1.0
        if calls == call:
            raise RuntimeError("out of memory")

    timings, errors = race({"fails": fail, "works": work}, "cpu", seconds=1.0, rounds=3)
    assert list(timings) == ["works"]
    assert len(timings["works"].rounds) == 3
    assert list(errors) == ["fails"]
    assert str(errors["fails"]) == "out of memory"
    assert errors["fails"].__traceback__ is None  # or it would keep tensors alive
    assert calls == call


def test_sets_of_inputs_exceed_the_cache(monkeypatch):
    properties = SimpleNamespace(L2_cache_size=50_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert input_sets(2**30, "cuda") == 1
    assert input_sets(200_000_000, "cuda") == 1
    assert input_sets(199_999_999, "cuda") == 2
    assert input_sets(4_000_000, "cuda") == 50
    assert input_sets(1000, "cuda") == 128
    assert input_sets(1000, "cpu") == 1
