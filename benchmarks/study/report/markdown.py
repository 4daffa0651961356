"""Tables in Markdown that can be read in a terminal too, and the numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.study.report.runs import Summary

NOTHING = "-"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A Markdown table with aligned columns.

    Args:
        head: Names of the columns.
        rows: As many cells each.
        left: Columns set to the left; numbers go to the right.
    """
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    lines = [_line(row, widths, left) for row in cells]
    rule = [
        "-" * width if column in left else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
    padded = [
        cell.ljust(width) if column in left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def spread(summary: Summary | None, digits: int = 3) -> str:
    """Mean ± standard deviation; the mean alone of a single seed."""
    if summary is None:
        return NOTHING
    mean = f"{summary.mean:.{digits}f}"
    return mean if summary.std is None else f"{mean} ± {summary.std:.{digits}f}"


def difference(summary: Summary | None, seeds: int) -> str:
    """A mean difference and its range over seeds, and of how many where not of all `seeds`."""
    if summary is None:
        return NOTHING
    mean = f"{summary.mean:+.3f}"
    if summary.seeds > 1:
        mean += f" ({summary.low:+.3f} to {summary.high:+.3f})"
    if summary.seeds < seeds:
        mean += f", {summary.seeds} of {seeds} seeds"
    return mean


def bold_best(cells: list[str], summaries: Sequence[Summary | None]) -> list[str]:
    """The cells of a column with the highest mean in bold, where there is something to beat."""
    means = [summary.mean for summary in summaries if summary is not None]
    if len(means) < 2:
        return cells
    return [
        f"**{cell}**" if summary is not None and summary.mean == max(means) else cell
        for cell, summary in zip(cells, summaries, strict=True)
    ]
