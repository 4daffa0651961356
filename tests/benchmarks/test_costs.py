"""Regressions, and the roofline by hand."""

from dataclasses import replace

import pytest

from benchmarks.costs import Costs, complaints

OLD = Costs(
    kernel="count_bce_kernel.index.fp32",
    target="sm_90",
    compiler="triton 3.9.0, ptxas 13.4.59",
    registers=40,
    spilled_bytes=0,
    shared_bytes=128,
    outside=100,
    moved=4.0,
    elements=8.0,
    instructions=20.0,
    special=2.0,
    conversions=1.0,
    loads={"16": 2, "8": 2},
    stores={"16": 2},
)


def test_nothing_is_worse_than_itself():
    assert complaints(OLD, OLD) == []


WORSE = {
    "registers": {"registers": 45},
    "instructions per element": {"instructions": 22.1},
    "special functions per element": {"special": 2.25},
    "conversions per element": {"conversions": 1.125},
    "loads per element": {"loads": {"16": 2, "8": 3}},
    "stores per element": {"stores": {"16": 3}},
}


@pytest.mark.parametrize("metric", WORSE)
def test_more_than_a_tenth_is_worse(metric):
    (complaint,) = complaints(OLD, replace(OLD, **WORSE[metric]))
    assert complaint.startswith(f"count_bce_kernel.index.fp32 on sm_90: {metric} rose from ")
    old, new = OLD.metrics[metric], replace(OLD, **WORSE[metric]).metrics[metric]
    assert complaint.endswith(f"from {old:g} to {new:g}")


def test_what_was_zero_may_not_appear():
    none = replace(OLD, conversions=0.0)
    assert complaints(none, replace(OLD, conversions=0.125)) != []


@pytest.mark.parametrize(
    ("metric", "change"),
    [("bytes per load", {"loads": {"8": 4}}), ("bytes per store", {"stores": {"4": 2}})],
)
def test_narrower_is_worse(metric, change):
    (complaint,) = complaints(OLD, replace(OLD, **change))
    assert f"{metric} fell from 16 to" in complaint


def test_a_spill_is_worse_whatever_the_baseline_says():
    spills = replace(OLD, spilled_bytes=8)
    (complaint,) = complaints(spills, spills)
    assert complaint == "count_bce_kernel.index.fp32 on sm_90 spills 8 bytes"


def test_a_kernel_must_be_in_the_baseline():
    assert complaints(None, OLD) == ["count_bce_kernel.index.fp32 on sm_90 is not in the baseline"]


def test_of_another_compiler_only_spills_and_widths_count():
    other = replace(OLD, compiler="triton 3.3.0, ptxas 12.8.61")
    heavy = replace(OLD, registers=255, instructions=99.0, special=9.0)
    assert complaints(other, heavy) == []
    found = complaints(other, replace(heavy, spilled_bytes=4, loads={"4": 8}))
    assert len(found) == 2
    assert "spills" in found[0]
    assert "bytes per load" in found[1]


def test_the_roofline_by_hand():
    roofs = OLD.roofs
    assert roofs["memory"] == pytest.approx(750e9)  # 3.0e12 bytes / 4
    assert roofs["issue"] == pytest.approx(1436.16e9)  # 132 * 1.7e9 * 128 / 20
    assert roofs["special"] == pytest.approx(1196.8e9)  # 132 * 1.7e9 * 16 / (2 + 1)
    assert replace(OLD, special=0.0, conversions=0.0).roofs["special"] == float("inf")


def test_a_kernel_without_elements_has_no_roof_and_a_short_line():
    state = Costs("density_kernel", "sm_90", "triton 3.9.0", 32, 0, 64, 210)
    assert state.roofs == {}
    assert set(state.metrics) == {"registers"}
    assert Costs(**state.line()) == state
    assert "instructions" not in state.line()
