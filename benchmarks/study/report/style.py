"""Appearance of a report's figures: a style per method, panels, axes, legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

Dash = str | tuple[int, tuple[float, ...]]

# Okabe and Ito's colours and some of Tol's: distinct for colour-blind readers too.
GREY, ORANGE, BLUE, RED = "#7f7f7f", "#E69F00", "#0072B2", "#D55E00"
OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288", "#000000")
RESERVED = {"ce": GREY, "focal": ORANGE, "ghm": BLUE}
MARKERS = ("o", "s", "^", "D")
DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
SMALL = 8.5
COLUMNS = 3
NARROW = 4.0  # ratio of a logarithmic axis's ends below which every tick has a label
NARROWEST = 5.6  # inches: minimum width of a figure


class NothingToDrawError(ValueError):
    """The rows that a figure needs are missing."""


class Style(NamedTuple):
    """Appearance of a method in every figure."""

    color: str
    marker: str
    linestyle: Dash


def styles_of(frame: DataFrame) -> dict[str, Style]:
    """Assign a style to every method.

    Cross entropy is grey, focal loss orange, GHM blue, and the first other method that trains at
    the paper's strength red. Further colours repeat with another marker and dash, so that 28
    methods remain distinct.
    """
    strengths = frame.groupby("method", sort=False).strength.nth(0)
    methods = dict(zip(frame.method[strengths.index], strengths, strict=True))
    colours = dict(RESERVED)
    paper = (name for name, strength in methods.items() if strength == 1 and name not in colours)
    colours.update((name, RED) for name in list(paper)[:1])
    styles = {name: Style(colour, MARKERS[0], DASHES[0]) for name, colour in colours.items()}
    for position, method in enumerate(name for name in methods if name not in colours):
        repeat, colour = divmod(position, len(OTHERS))
        repeat %= len(MARKERS)
        styles[method] = Style(OTHERS[colour], MARKERS[repeat], DASHES[repeat])
    return {method: styles[method] for method in methods}


def panels(
    titles: Sequence[str],
    width: float,
    height: float,
    columns: int = COLUMNS,
    *,
    share: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Make a figure of equal panels.

    Args:
        titles: Titles of the panels; broken after the first comma.
        width: Width of a panel in inches.
        height: Height of a panel in inches.
        columns: Maximum number of panels side by side.
        share: Whether the panels of a row share the vertical axis.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    size = max(NARROWEST, width * columns), height * rows
    figure = Figure(figsize=size, layout="constrained")
    grid = list(
        figure.subplots(rows, columns, squeeze=False, sharey="row" if share else "none").flat
    )
    for axes, title in zip(grid, titles, strict=False):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        axes.xaxis.label.set_size(SMALL + 1)
        axes.yaxis.label.set_size(SMALL + 1)
        axes.set_title(title.replace(", ", "\n", 1), fontsize=SMALL + 1)
        axes.set_axisbelow(True)
        axes.grid(axis="x" if share else "both", alpha=0.25)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    return figure, grid[: len(titles)]


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, labelled with plain numbers.

    Labels are at 1, 2, 3 and 5 of a decade; at every tick where the axis spans less than NARROW.
    """

    def label(value: float, _: float) -> str:
        low, high = axes.get_ylim()
        leading = f"{value:e}".partition(".")[0]
        return f"{value:g}" if high < NARROW * low or leading in "235" else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(label)
    axes.tick_params(which="minor", labelsize=SMALL - 1)


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """Add one legend below all panels, with every label once, in as many columns as fit."""
    handles: dict[str, Artist] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if not handles:
        return
    column = 0.6 + 0.075 * max(len(label) for label in handles)  # inches
    columns = max(1, min(int(figure.get_figwidth() / column), 6, len(handles)))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=SMALL,
    )
