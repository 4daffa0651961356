import numpy as np
import pytest

from benchmarks.study.report import figures
from benchmarks.study.report.figures import sweep, sweep_points
from benchmarks.study.report.runs import by_method
from benchmarks.study.report.style import (
    NothingToDrawError,
    styles_of,
)


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def lines(axes):
    return [tuple(map(list, line.get_data())) for line in axes.get_lines()]


def test_average_precision_draws_seeds_and_means(frame, make):
    rows = [make("focal", 0, 0.5), make("focal", 1, 0.7), make("ghm", 0, 0.8), make("ce", ap=None)]
    found = frame(*rows, make("focal", data="voc:bccd", ap=0.3))
    figure = figures.average_precision(found, styles_of(found), "focal")
    assert titles(figure) == ["digits\nretinanet, 600 steps", "voc:bccd\nretinanet, 600 steps"]
    digits, cells = figure.axes
    dots, mean, baseline, dot, alone = digits.get_lines()
    assert (list(dots.get_xdata()), list(dots.get_ydata())) == ([0.5, 0.7], [0, 0])
    assert list(mean.get_xdata()) == pytest.approx([0.6, 0.6])
    assert list(baseline.get_xdata()) == pytest.approx([0.6, 0.6])
    assert baseline.get_linestyle() == "--"
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([0.8], [1])
    assert list(alone.get_xdata()) == [0.8, 0.8]
    assert dot.get_color() == alone.get_color() == "#0072B2"
    assert [label.get_text() for label in digits.get_yticklabels()] == ["focal", "ghm"]
    assert digits.get_ylim()[0] > digits.get_ylim()[1]  # the first method is on top
    assert len(cells.get_lines()) == 3


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


def test_threshold_policies_are_bars_with_their_range(frame, make):
    def policies(f1, single):
        return {"f1": {"macro_f1": f1}, "single": {"macro_f1": single}}

    rows = [make(seed=0, policies=policies(0.6, 0.5)), make(seed=1, policies=policies(0.8, 0.6))]
    found = frame(*rows, make("ghm", policies=policies(0.9, None)), make("ce"))
    (axes,) = figures.threshold_policies(found).axes
    single, f1 = axes.containers[1], axes.containers[3]
    assert [container.get_label() for container in (single, f1)] == [
        "single (one for all classes)",
        "f1",
    ]
    assert [bar.get_width() for bar in single] == pytest.approx([0.55])
    assert [bar.get_width() for bar in f1] == pytest.approx([0.7, 0.9])
    # Two bars of 0.4 about the method's place.
    assert [bar.get_y() for bar in f1] == pytest.approx([0.0, 1.0])
    assert [bar.get_y() for bar in single] == pytest.approx([-0.4])
    (whiskers,) = axes.containers[2].lines[2]
    reach = [list(segment[:, 0]) for segment in whiskers.get_segments()]
    np.testing.assert_allclose(reach, [[0.6, 0.8], [0.9, 0.9]])


def test_the_initial_loss_is_lowest_at_the_mark():
    (axes,) = figures.initial_loss().axes
    positive, negative, total, mark = axes.get_lines()
    priors = total.get_xdata()
    at = np.argmin(total.get_ydata())
    # The optimum is 1 / (1000 x 80); 400 priors over 10 decades lie 6 % apart.
    assert priors[at] == pytest.approx(1.25e-5, rel=0.06)
    assert mark.get_xdata()[0] == 1.25e-5
    assert mark.get_ydata()[0] == pytest.approx(-np.log(1.25e-5) + 79999 * 1.25e-5, rel=1e-4)
    np.testing.assert_allclose(positive.get_ydata(), -np.log(priors))
    np.testing.assert_allclose(negative.get_ydata(), -79999 * np.log1p(-priors))
    np.testing.assert_allclose(total.get_ydata(), positive.get_ydata() + negative.get_ydata())


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


def norms(positives, negatives):
    return {"positives": positives, "negatives": negatives}


@pytest.fixture
def harmonized(frame, make):
    """Focal, and GHM at strength 0.5, with two seeds and two regions; CE has no histogram."""
    rows = [make("focal", gradient_norms=norms([4, 0], [100, 10])), make("ce")]
    for seed, many in ((0, 10), (1, 14)):
        rows.append(
            make("ghm", seed, strength=0.5, bins=2, gradient_norms=norms([2, 1], [many, 3]))
        )
    return frame(*rows)


def test_histograms_are_drawn_apart_on_a_logarithmic_axis(harmonized):
    figure = figures.histograms(harmonized, styles_of(harmonized))
    positives, negatives = figure.axes
    for axes, expected in ((positives, [[4, np.nan], [2, 1]]), (negatives, [[100, 10], [12, 3]])):
        assert axes.get_yscale() == "log"
        drawn = [patch.get_data() for patch in axes.patches]
        np.testing.assert_array_equal([each.values for each in drawn], expected)
        np.testing.assert_array_equal(drawn[0].edges, [0, 0.5, 1])
    assert positives.get_ylabel() == "positives (entries)"
    assert negatives.get_ylabel() == "negatives (entries)"
    assert [patch.get_edgecolor()[:3] for patch in positives.patches][1] == pytest.approx(
        (0, 0x72 / 255, 0xB2 / 255)
    )


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_reformulated_gradients_of_every_loss(harmonized):
    (axes,) = figures.reformulated(harmonized).axes
    drawn = labelled(axes)
    assert list(drawn) == [
        "CE",
        "focal, of a positive",
        "focal, of a negative",
        "GHM, strength 0.5 (as trained)",
        "GHM, strength 1 (paper)",
    ]
    np.testing.assert_array_equal(drawn["CE"].get_xdata(), drawn["CE"].get_ydata())
    assert drawn["CE"].get_xdata()[-1] == 1
    assert drawn["focal, of a positive"].get_ydata()[-1] == pytest.approx(0.25)
    assert drawn["focal, of a negative"].get_ydata()[-1] == pytest.approx(0.75)
    # 14 and 4 of 18 entries in 2 regions: beta is 18 / 28 and 18 / 8.
    paper = drawn["GHM, strength 1 (paper)"]
    np.testing.assert_allclose(paper.get_xdata(), [0.25, 0.75])
    np.testing.assert_allclose(paper.get_ydata(), [0.25 * 18 / 28, 0.75 * 18 / 8])
    trained = drawn["GHM, strength 0.5 (as trained)"].get_ydata()
    np.testing.assert_allclose(trained, [0.25 * (18 / 28) ** 0.5, 0.75 * (18 / 8) ** 0.5])
    assert axes.get_title().endswith("density of ghm")


def test_contributions_are_shares_of_the_same_entries(harmonized):
    (axes,) = figures.contribution(harmonized).axes
    drawn = labelled(axes)
    assert list(drawn) == [
        "CE",
        "focal",
        "GHM, strength 0.5 (as trained)",
        "GHM, strength 1 (paper)",
    ]
    # 14 x 0.25 and 4 x 0.75: 3.5 and 3.
    np.testing.assert_allclose(drawn["CE"].get_ydata(), [3.5 / 6.5, 3 / 6.5])
    np.testing.assert_allclose(drawn["GHM, strength 1 (paper)"].get_ydata(), [0.25, 0.75])
    assert drawn["CE"].get_color() == "#7f7f7f"
