"""How a report's figures look: a style for every method, panels, legends. Loads matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.report.runs import Group

Dash = str | tuple[int, tuple[float, ...]]

# Okabe and Ito's colours and some of Tol's: colour-blind readers tell them apart too.
GREY, ORANGE, BLUE, RED = "#7f7f7f", "#E69F00", "#0072B2", "#D55E00"
OTHERS = ("#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288", "#000000")
RESERVED = {"ce": GREY, "focal": ORANGE, "ghm": BLUE}
MARKERS = ("o", "s", "^", "D")
DASHES: tuple[Dash, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")
SMALL = 8.5
COLUMNS = 3
NARROW = 4.0  # upper to lower end of a logarithmic axis, where every tick has its label
NARROWEST = 5.6  # inches, of a figure


class NothingToDrawError(ValueError):
    """A figure whose rows are missing; says which."""


class Style(NamedTuple):
    """How a method is drawn in every figure."""

    color: str
    marker: str
    linestyle: Dash


def styles_of(groups: Iterable[Group]) -> dict[str, Style]:
    """A style for every method, the same in every figure.

    Cross entropy is grey, focal loss orange, GHM blue, and the first other method that trains at
    the paper's strength red. Where the further colours run out they come again with another marker
    and dash, so that 28 methods can be told apart.
    """
    methods: dict[str, object] = {}
    for group in groups:
        methods.setdefault(group.method, group.runs[0].get("strength"))
    colours = dict(RESERVED)
    paper = (name for name, strength in methods.items() if strength == 1 and name not in colours)
    colours.update((name, RED) for name in list(paper)[:1])
    styles = {name: Style(colour, MARKERS[0], DASHES[0]) for name, colour in colours.items()}
    for place, method in enumerate(name for name in methods if name not in colours):
        again, colour = divmod(place, len(OTHERS))
        again %= len(MARKERS)
        styles[method] = Style(OTHERS[colour], MARKERS[again], DASHES[again])
    return {method: styles[method] for method in methods}


def panels(
    count: int, width: float, height: float, columns: int = COLUMNS, *, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, without frames on the right and at the top.

    Args:
        count: Panels.
        width: Of one, in inches.
        height: Of one.
        columns: Panels side by side, at most.
        share: Whether panels of a row share the vertical axis.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    size = max(NARROWEST, width * columns), height * rows
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row" if share else "none")
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=SMALL)
        axes.xaxis.label.set_size(SMALL + 1)
        axes.yaxis.label.set_size(SMALL + 1)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def entitle(axes: Axes, title: str) -> None:
    """A panel's title, broken after the data set so that neighbours do not touch."""
    data, _, rest = title.partition(", ")
    axes.set_title(f"{data}\n{rest}" if rest else data, fontsize=SMALL + 1)


def log_scale(axes: Axes) -> None:
    """A logarithmic vertical axis whose labels are plain numbers.

    Of a decade those at 1, 2, 3 and 5; all where the axis spans little.
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
    """One legend under all panels, every label once, in as many columns as fit."""
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
