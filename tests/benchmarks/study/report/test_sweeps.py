import pytest

from benchmarks.study.report.style import NothingToDrawError, styles_of
from benchmarks.study.report.sweeps import sweep, sweeps_of


def bins(make, count, ap, seed=0, **fields):
    fields = {"section": "bins", "options": {"bins": count}, **fields}
    return make(f"bins-{count}", seed, ap, bins=count, **fields)


def split(found, section):
    return [group for group in found if group.setting.section == section]


def test_a_sweep_has_the_rows_of_its_section_and_the_default(groups, make):
    rows = [bins(make, 40, 0.7), bins(make, 10, 0.5), bins(make, 10, 0.6, seed=1)]
    rows += [make("ghm", 0, 0.65, bins=30), make("ghm", 0, 0.1, bins=31, steps=10)]
    rows += [make("guided", 0, 0.2, bins=32, options={"guided_loss": True})]
    rows += [make("clean", 0, 0.3, bins=33, config={"assigner": "cleanliness"})]
    rows += [make("ce", 0, 0.4)]
    found = groups(*rows)
    (line,) = sweeps_of(split(found, "bins"), found, ["bins"])
    assert line.points == {10: [0.5, 0.6], 30: [0.65], 40: [0.7]}
    assert list(line.points) == [10, 30, 40]
    assert line.label == "mean over seeds"


def test_other_seeds_are_left_out_of_line_and_baseline(groups, make):
    rows = [bins(make, 10, 0.5, seed=1), bins(make, 20, 0.7, seed=1)]
    rows += [make("ghm", seed, ap, bins=30) for seed, ap in ((1, 0.6), (2, 0.1))]
    rows += [make("ghm40", 2, 0.1, bins=40)]
    rows += [make("focal", seed, ap) for seed, ap in ((1, 0.4), (2, 0.9), (3, 0.9))]
    found = groups(*rows)
    (axes,) = sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal").axes
    line, *_, baseline = axes.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20, 30], [0.5, 0.7, 0.6])
    assert line.get_label() == "seed 1"
    assert list(baseline.get_ydata()) == [0.4, 0.4]
    found = groups(*rows[:2], *rows[-2:])
    (axes,) = sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal").axes
    assert "focal" not in [line.get_label() for line in axes.get_lines()]


def test_a_line_without_a_second_seed_anywhere_is_no_mean(groups, make):
    found = groups(bins(make, 10, 0.5, seed=2), bins(make, 20, 0.7, seed=1))
    (line,) = sweeps_of(found, found, ["bins"])
    assert line.label == "seeds 1, 2"


def test_what_other_defaults_made_is_not_on_the_line(groups, make):
    rows = [bins(make, 10, 0.5, recipe="b10"), make("ghm", 0, 0.6, section="bins", recipe="b")]
    rows[1]["bins"] = 30
    rows += [make("ghm", 0, 0.1, bins=30, recipe="a")]
    rows += [make("bins-20", 0, 0.2, bins=20, options={"bins": 20}, recipe="a20")]
    (line,) = sweeps_of(split(groups(*rows), "bins"), groups(*rows), ["bins"])
    assert line.points == {10: [0.5], 30: [0.6]}
    rows[2]["recipe"] = "b"
    (line,) = sweeps_of(split(groups(*rows), "bins"), groups(*rows), ["bins"])
    assert line.points == {10: [0.5], 20: [0.2], 30: [0.6]}


def test_seeds_of_different_recipes_are_different_lines(groups, make):
    found = groups(bins(make, 10, 0.5, recipe="a"), bins(make, 10, 0.6, seed=1, recipe="b"))
    one, other = sweeps_of(found, found, ["bins"])
    assert (one.label, one.points) == ("recipe a", {10: [0.5]})
    assert (other.label, other.points) == ("recipe b", {10: [0.6]})


def test_the_sections_own_row_comes_before_another_sections(groups, make):
    found = groups(make("ghm", 0, 0.9, bins=10), bins(make, 10, 0.5), bins(make, 20, 0.6))
    (line,) = sweeps_of(split(found, "bins"), found, ["bins"])
    assert line.points == {10: [0.5], 20: [0.6]}


def test_other_options_make_another_line(groups, make):
    def strength(value, ap, **others):
        options = {"strength": value, "reg_strength": value, **others}
        fields = {"section": "strength", "strength": value, "options": options}
        return make(f"s{value}{others}", 0, ap, **fields)

    found = groups(strength(0.0, 0.5), strength(0.5, 0.6), strength(1.0, 0.1, average="valid"))
    one, other = sweeps_of(found, found, ["strength", "reg_strength"])
    assert one.points == {0.0: [0.5], 0.5: [0.6]}
    assert (other.label, other.points) == ("average=valid", {1.0: [0.1]})


def test_what_is_drawn_is_the_means_the_seeds_and_the_baseline(groups, make):
    rows = [bins(make, 10, 0.5), bins(make, 10, 0.6, seed=1), bins(make, 20, 0.7)]
    rows += [make("focal", 0, 0.4), make("focal", 1, 0.5)]
    found = groups(*rows)
    (axes,) = sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal").axes
    line, ten, twenty, baseline = axes.get_lines()
    assert list(line.get_xdata()) == [10, 20]
    assert list(line.get_ydata()) == pytest.approx([0.55, 0.7])
    assert (list(ten.get_xdata()), list(ten.get_ydata())) == ([10, 10], [0.5, 0.6])
    assert (list(twenty.get_xdata()), list(twenty.get_ydata())) == ([20], [0.7])
    assert list(baseline.get_ydata()) == pytest.approx([0.45, 0.45])
    assert baseline.get_label() == "focal"
    assert baseline.get_color() == "#E69F00"
    assert axes.get_xlabel() == "regions"


def test_without_rows_there_is_nothing_to_draw(groups, make):
    found = groups(make("focal"), make("focal", section="bins"))
    with pytest.raises(NothingToDrawError, match="no AP by bins in section 'bins'"):
        sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal")
