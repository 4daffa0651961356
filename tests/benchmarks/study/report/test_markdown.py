import pytest

from benchmarks.study.report.markdown import bold_best, difference, spread, table
from benchmarks.study.report.runs import Summary


def test_a_table_lines_up_and_escapes_bars():
    assert table(("name", "n"), [["a|b", "1"], ["long name", "10"]]).splitlines() == [
        "| name      |   n |",
        "| --------- | --: |",
        "| a\\|b      |   1 |",
        "| long name |  10 |",
    ]


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (Summary(0.51234, 0.0126, 0.5, 0.6, 3), "0.512 ± 0.013"),
        (Summary(0.5, None, 0.5, 0.5, 1), "0.500"),
        (None, "-"),
    ],
)
def test_spread(summary, text):
    assert spread(summary) == text


@pytest.mark.parametrize(
    ("summary", "text"),
    [
        (Summary(0.02, 0.01, -0.01, 0.03, 3), "+0.020 (-0.010 to +0.030)"),
        (Summary(-0.02, 0.01, -0.03, 0.01, 2), "-0.020 (-0.030 to +0.010), 2 of 3 seeds"),
        (Summary(0.02, None, 0.02, 0.02, 1), "+0.020, 1 of 3 seeds"),
        (None, "-"),
    ],
)
def test_difference(summary, text):
    assert difference(summary, 3) == text


def test_the_best_of_several_is_bold():
    low, high = Summary(0.1, None, 0.1, 0.1, 1), Summary(0.2, None, 0.2, 0.2, 1)
    assert bold_best(["a", "b", "c"], [low, high, None]) == ["a", "**b**", "c"]
    assert bold_best(["a", "b"], [high, high]) == ["**a**", "**b**"]
    assert bold_best(["a", "b"], [high, None]) == ["a", "b"]
