import numpy as np
import pytest

from benchmarks.study.report import figures
from benchmarks.study.report.style import NothingToDrawError, styles_of


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_visible()]


def lines(axes):
    return [tuple(map(list, line.get_data())) for line in axes.get_lines()]


def test_average_precision_draws_seeds_and_means(groups, make):
    rows = [make("focal", 0, 0.5), make("focal", 1, 0.7), make("ghm", 0, 0.8), make("ce", ap=None)]
    found = groups(*rows, make("focal", data="voc:bccd", ap=0.3))
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


def test_loss_curves_are_means_over_seeds(groups, make):
    rows = [make(seed=0, curves=curves([10, 20], [4.0, 2.0], [1.0, None]))]
    rows += [make(seed=1, curves=curves([10, 20], [2.0, 1.0], [3.0, 0.0])), make("ce")]
    found = groups(*rows)
    figure = figures.loss_curves(found, styles_of(found))
    classification, regression = figure.axes
    assert lines(classification) == [([10, 20], [3.0, 1.5])]
    # Neither null nor 0 lies on a logarithmic axis.
    assert lines(regression) == [([10], [2.0])]
    assert classification.get_ylabel() == "classification loss"
    assert regression.get_ylabel() == "regression loss"
    assert classification.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["focal"]


def test_a_guided_classification_is_drawn_as_it_was_before(groups, make):
    boxes, before = [1.0, 0.5, 0.3], [9.0, 8.0, 6.0]
    told = {**curves([10, 20, 30], boxes, boxes), "unguided_classification": before}
    earlier = curves([10, 20, 30], [2.00001, 1.0, 0.6], boxes)  # twice the boxes, as rows round
    free = curves([10, 20, 30], [2.0, 1.0, 0.5], boxes)
    rows = [make("focal", curves=free), make("ghm", 0, curves=told)]
    rows += [make("ghm", 1, curves=earlier), make("old", curves=earlier), make("none")]
    found = groups(*rows)
    classification, regression = figures.loss_curves(found, styles_of(found)).axes
    drawn = [list(line.get_ydata()) for line in classification.get_lines()]
    assert drawn == [free["classification"], before]
    assert len(regression.get_lines()) == 3
    lacking = [group.method for group in found if figures.lacks_classification(group)]
    assert lacking == ["old"]
    assert figures.loss_curves([found[2]], styles_of(found)).axes[0].get_lines() == []


def test_threshold_policies_are_bars_with_their_range(groups, make):
    def policies(f1, single):
        return {"f1": {"macro_f1": f1}, "single": {"macro_f1": single}}

    rows = [make(seed=0, policies=policies(0.6, 0.5)), make(seed=1, policies=policies(0.8, 0.6))]
    found = groups(*rows, make("ghm", policies=policies(0.9, None)), make("ce"))
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
        (figures.threshold_policies, "no row tells of threshold policies"),
    ],
)
def test_a_figure_without_rows_is_not_drawn(groups, make, draw, reason):
    with pytest.raises(NothingToDrawError, match=reason):
        draw(groups(make(ap=None)))
