import pytest

from ghm_triton.report.style import NothingToDrawError, styles_of
from ghm_triton.report.sweeps import sweep, sweeps_of


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
