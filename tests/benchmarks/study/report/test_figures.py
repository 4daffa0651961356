import pytest

from benchmarks.study.report import figures
from benchmarks.study.report.figures import sweep, sweep_points
from benchmarks.study.report.runs import by_method
from benchmarks.study.report.style import (
    NothingToDrawError,
    styles_of,
)


def lines(axes):
    return [tuple(map(list, line.get_data())) for line in axes.get_lines()]


def curves(step, classification, regression):
    return {"step": step, "classification": classification, "bbox_regression": regression}


def test_loss_curves_are_means_over_seeds(frame, make):
    rows = [make(seed=0, curves=curves([10, 20], [4.0, 2.0], [1.0, None]))]
    rows += [make(seed=1, curves=curves([10, 20], [2.0, 1.0], [3.0, 0.0])), make("ce")]
    found = frame(*rows)
    figure = figures.loss_curves(found, styles_of(found))
    classification, regression = figure.axes
    assert lines(classification) == [([10, 20], [3.0, 1.5])]
    # Neither null nor 0 lies on a logarithmic axis.
    assert lines(regression) == [([10], [2.0])]
    assert classification.get_ylabel() == "classification loss"
    assert regression.get_ylabel() == "regression loss"
    assert classification.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["focal"]


def test_a_guided_classification_is_drawn_as_it_was_before(frame, make):
    boxes, before = [1.0, 0.5, 0.3], [9.0, 8.0, 6.0]
    told = {**curves([10, 20, 30], boxes, boxes), "unguided_classification": before}
    earlier = curves([10, 20, 30], [2.00001, 1.0, 0.6], boxes)  # twice the boxes, as rows round
    free = curves([10, 20, 30], [2.0, 1.0, 0.5], boxes)
    rows = [make("focal", curves=free), make("ghm", 0, curves=told)]
    rows += [make("ghm", 1, curves=earlier), make("old", curves=earlier), make("none")]
    found = frame(*rows)
    classification, regression = figures.loss_curves(found, styles_of(found)).axes
    drawn = [list(line.get_ydata()) for line in classification.get_lines()]
    assert drawn == [free["classification"], before]
    assert len(regression.get_lines()) == 3
    lacking = [name for name, rows in by_method(found) if figures.lacks_classification(rows)]
    assert lacking == ["old"]
    alone = figures.loss_curves(found[found.method == "old"], styles_of(found))
    assert alone.axes[0].get_lines() == []


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (lambda found: figures.average_precision(found, styles_of(found), "ce"), "no row has an"),
        (lambda found: figures.loss_curves(found, styles_of(found)), "no row has loss curves"),
        (figures.threshold_policies, "no row has threshold policies"),
    ],
)
def test_a_figure_without_rows_is_not_drawn(frame, make, draw, reason):
    with pytest.raises(NothingToDrawError, match=reason):
        draw(frame(make(ap=None)))


def bins(make, count, ap, seed=0, **fields):
    fields = {"section": "bins", "options": {"bins": count}, **fields}
    return make(f"bins-{count}", seed, ap, bins=count, **fields)


def points_of(rows, options=("bins",)):
    """AP by value, by line, of the sweep of the section other than `methods`."""
    part = rows[(rows.section != "methods") & (rows.steps == 600)]
    lines = {}
    for point in sweep_points(part, rows, options).sort_values(["value", "seed"]).itertuples():
        lines.setdefault(point.line, {}).setdefault(point.value, []).append(point.ap)
    return lines


def test_a_sweep_has_the_rows_of_its_section_and_the_default(frame, make):
    rows = [bins(make, 40, 0.7), bins(make, 10, 0.5), bins(make, 10, 0.6, seed=1)]
    rows += [make("ghm", 0, 0.65, bins=30), make("ghm", 0, 0.1, bins=31, steps=10)]
    rows += [make("guided", 0, 0.2, bins=32, options={"guided_loss": True})]
    rows += [make("clean", 0, 0.3, bins=33, config={"assigner": "cleanliness"})]
    rows += [make("ce", 0, 0.4)]
    assert points_of(frame(*rows)) == {"": {10: [0.5, 0.6], 30: [0.65], 40: [0.7]}}


def test_other_seeds_are_left_out_of_line_and_baseline(frame, make):
    rows = [bins(make, 10, 0.5, seed=1), bins(make, 20, 0.7, seed=1)]
    rows += [make("ghm", seed, ap, bins=30) for seed, ap in ((1, 0.6), (2, 0.1))]
    rows += [make("ghm40", 2, 0.1, bins=40)]
    rows += [make("focal", seed, ap) for seed, ap in ((1, 0.4), (2, 0.9), (3, 0.9))]
    found = frame(*rows)
    (axes,) = sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal").axes
    line, *_, baseline = axes.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([10, 20, 30], [0.5, 0.7, 0.6])
    assert line.get_label() == "seed 1"
    assert list(baseline.get_ydata()) == [0.4, 0.4]
    found = frame(*rows[:2], *rows[-2:])
    (axes,) = sweep(found, styles_of(found), "bins", ["bins"], "regions", "focal").axes
    assert "focal" not in [line.get_label() for line in axes.get_lines()]


def test_what_other_defaults_made_is_not_on_the_line(frame, make):
    rows = [bins(make, 10, 0.5, recipe="b10"), make("ghm", 0, 0.6, section="bins", recipe="b")]
    rows[1]["bins"] = 30
    rows += [make("ghm", 0, 0.1, bins=30, recipe="a")]
    rows += [make("bins-20", 0, 0.2, bins=20, options={"bins": 20}, recipe="a20")]
    assert points_of(frame(*rows)) == {"": {10: [0.5], 30: [0.6]}}
    rows[2]["recipe"] = "b"
    assert points_of(frame(*rows)) == {"": {10: [0.5], 20: [0.2], 30: [0.6]}}


def test_other_options_make_another_line(frame, make):
    def strength(value, ap, **others):
        options = {"strength": value, "reg_strength": value, **others}
        fields = {"section": "strength", "strength": value, "options": options}
        return make(f"s{value}{others}", 0, ap, **fields)

    found = frame(strength(0.0, 0.5), strength(0.5, 0.6), strength(1.0, 0.1, average="valid"))
    points = points_of(found, ["strength", "reg_strength"])
    assert points == {"": {0.0: [0.5], 0.5: [0.6]}, "average=valid": {1.0: [0.1]}}
