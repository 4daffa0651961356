import numpy as np
import pytest

from benchmarks.study.report import gradient_figures
from benchmarks.study.report.style import NothingToDrawError, styles_of


def norms(positives, negatives):
    return {"positives": positives, "negatives": negatives}


@pytest.fixture
def found(groups, make):
    """Focal, and GHM at strength 0.5, with two seeds and two regions; CE has no histogram."""
    rows = [make("focal", gradient_norms=norms([4, 0], [100, 10])), make("ce")]
    for seed, many in ((0, 10), (1, 14)):
        rows.append(
            make("ghm", seed, strength=0.5, bins=2, gradient_norms=norms([2, 1], [many, 3]))
        )
    return groups(*rows)


def test_histograms_are_drawn_apart_on_a_logarithmic_axis(found):
    figure = gradient_figures.histograms(found, styles_of(found))
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


def test_reformulated_gradients_of_every_loss(found):
    (axes,) = gradient_figures.reformulated(found).axes
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


def test_contributions_are_shares_of_the_same_entries(found):
    (axes,) = gradient_figures.contribution(found).axes
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


def test_the_density_is_of_the_method_called_ghm_or_of_the_first_with_a_strength(groups, make):
    some = norms([1, 1], [5, 1])
    rows = [make("focal", gradient_norms=some), make("late", strength=0.1, gradient_norms=some)]
    rows += [make("ghm", strength=0.2, gradient_norms=some)]
    ((group, _),) = gradient_figures.harmonized(groups(*rows)).values()
    assert group.method == "ghm"
    ((group, _),) = gradient_figures.harmonized(groups(*rows[:2])).values()
    assert group.method == "late"


def test_a_falling_strength_says_so_and_the_papers_is_drawn_once(groups, make):
    row = make("ghm", strength=0.4, gradient_norms=norms([1, 1], [5, 1]))
    falling = groups({**row, "options": {"strength_end": 0.0}})
    (axes,) = gradient_figures.contribution(falling).axes
    assert "GHM, strength 0.4 at first, 0 at last (as trained)" in labelled(axes)
    (axes,) = gradient_figures.contribution(groups({**row, "strength": 1.0})).axes
    assert list(labelled(axes)) == ["CE", "focal", "GHM, strength 1 (as trained; paper)"]


@pytest.mark.parametrize("draw", [gradient_figures.reformulated, gradient_figures.contribution])
def test_without_harmonized_rows_there_is_nothing_to_draw(groups, make, draw):
    rows = [make("focal", gradient_norms=norms([1], [1])), make("ghm", strength=0.5)]
    with pytest.raises(NothingToDrawError, match="GHM has gradient norms"):
        draw(groups(*rows))
    found = groups(rows[1])
    with pytest.raises(NothingToDrawError, match="no row has gradient norms"):
        gradient_figures.histograms(found, styles_of(found))
