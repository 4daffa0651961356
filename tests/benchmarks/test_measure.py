"""Rows of a case: every loss in every stage, and failures."""

import pytest

from benchmarks import measure as module
from benchmarks.loss_cases import Case, Contender
from benchmarks.measure import Settings, measure
from benchmarks.result_file import BOTH, FORWARD, SCALED
from benchmarks.timing import Timing

CASE = Case("classification", 4000, "float32", "index", "cpu")
SETTINGS = Settings(seconds=0.001, rounds=2, compiler=None)


def field(monkeypatch, *contenders):
    monkeypatch.setattr(module, "contenders", lambda *_: list(contenders))


def good(logits, target):
    return logits.sigmoid().mean()


def rows_of(case=CASE, settings=SETTINGS, roof=1.0, skip=()):
    rows = list(measure(case, settings, roof, set(skip)))
    assert all(row.items() >= case.key.items() for row in rows)
    return {(row["loss"], row["stage"]): row for row in rows}


def test_every_loss_in_every_stage():
    """Our losses, configured as released, equal the released algorithm."""
    for task, target, ours in (
        ("classification", "index", "ghm_c"),
        ("regression", "dense", "ghm_r"),
    ):
        for dtype, close in (("float32", 1e-5), ("bfloat16", 0.05)):  # three operations of 2^-8
            rows = rows_of(Case(task, 4000, dtype, target, "cpu"))
            assert not [row for row in rows.values() if "error" in row]
            for stage in (FORWARD, BOTH, SCALED):
                assert (f"{ours} torch", stage) in rows
            for loss, _ in rows:
                assert loss == "copy" or {(loss, FORWARD), (loss, BOTH)} <= set(rows)
            value = rows[f"{ours} torch", BOTH]["value"]
            assert value == pytest.approx(rows[f"{ours} released", BOTH]["value"], rel=close)
            if ours == "ghm_c":
                value = rows["focal torch", BOTH]["value"]
                peer = rows["focal torchvision one-hot", BOTH]["value"]
                assert value == pytest.approx(peer, rel=close)


def test_figures_are_derived(monkeypatch):
    """With fixed times: 4000 entries of 12 bytes in 2 ms are 24e6 bytes per second."""
    field(
        monkeypatch,
        Contender("ghm_c triton", lambda: good),
        Contender("bce", lambda: good, dense=True),
        Contender("ghm_c released", lambda: good),
    )
    ms = {"ghm_c triton": 2.0, "bce": 4.0, "ghm_c released": 100.0, "copy": 0.5}
    extra = {SCALED: 1.0, FORWARD: -0.5}

    def race(works, device, seconds, rounds):
        taken = {label: ms[label[0]] + extra.get(label[1], 0.0) for label in works}
        return {label: Timing(((each, each),) * rounds) for label, each in taken.items()}, {}

    monkeypatch.setattr(module, "race", race)
    monkeypatch.setattr(module, "peak_bytes", lambda *_: 16_400)
    rows = rows_of(roof=0.032)
    ours = rows["ghm_c triton", BOTH]
    assert (ours["median_ms"], ours["p20_ms"], ours["p80_ms"], ours["calls"]) == (2, 2, 2, 4)
    assert ours["backward_ms"] == 0.5
    assert ours["ratios"] == {"bce": 0.5, "ghm_c released": 0.02}
    assert ours["bytes_per_entry"] == 12
    assert ours["gb_per_s"] == pytest.approx(0.024)
    # The copy moves 4000 * 8 bytes in 0.5 ms, 0.064 GB/s: better than the roof that was given.
    assert rows["copy", "copy"]["gb_per_s"] == pytest.approx(0.064)
    assert ours["share_of_copy"] == pytest.approx(0.024 / 0.064)
    assert rows_of(roof=0.12)["ghm_c triton", BOTH]["share_of_copy"] == pytest.approx(0.2)
    assert ours["peak_ratio"] == pytest.approx(16_400 / 16_000)
    scaled = rows["ghm_c triton", SCALED]  # against the others' plain stage: they have no other
    assert scaled["ratios"] == {"bce": 0.75, "ghm_c released": 0.03}
    assert ("bce", SCALED) not in rows
    assert "share_of_copy" not in rows["bce", BOTH]
