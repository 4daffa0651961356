"""The papers' figures of gradient norms, drawn from a study's own detectors. Loads matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study.report.gradients import (
    Histogram,
    contributions,
    focal_negative,
    focal_positive,
    harmonizing_weights,
    histogram_of,
)
from benchmarks.study.report.runs import Group, Setting, by_setting, number, titles
from benchmarks.study.report.style import (
    BLUE,
    GREY,
    ORANGE,
    RED,
    NothingToDrawError,
    Style,
    entitle,
    legend_below,
    panels,
)

NORM = "gradient norm  g = |p - p*|"
NO_HISTOGRAMS = "no row has gradient norms"
PAPER = 1.0  # strength
FAINT = 1e-5
SIDES = ("positives", "negatives")


def has_histogram(group: Group) -> bool:
    """Whether any seed has gradient norms."""
    return histogram_of(group.runs) is not None


def histograms(groups: Sequence[Group], styles: Mapping[str, Style]) -> Figure:
    """Entries by gradient norm under the finished detectors, by method; positives and negatives."""
    found = [(group, histogram_of(group.runs)) for group in groups]
    drawn = {(group.setting, group.method): each for group, each in found if each is not None}
    if not drawn:
        raise NothingToDrawError(NO_HISTOGRAMS)
    settings = list(dict.fromkeys(setting for setting, _ in drawn))
    names = titles(settings)
    figure, grid = panels(2 * len(settings), 5.2, 3.2, columns=2)
    for place, setting in enumerate(settings):
        for axes, part in zip(grid[2 * place : 2 * place + 2], SIDES, strict=True):
            for (where, method), histogram in drawn.items():
                if where == setting:
                    style = styles[method]
                    counts = getattr(histogram, part)
                    axes.stairs(
                        np.where(counts > 0, counts, np.nan),
                        histogram.edges,
                        baseline=None,
                        color=style.color,
                        linestyle=style.linestyle,
                        linewidth=1.3,
                        label=method,
                    )
            axes.set(yscale="log", xlim=(0, 1), xlabel=NORM, ylabel=f"{part} (entries)")
            axes.grid(alpha=0.25)
            entitle(axes, names[setting])
    legend_below(figure, grid)
    return figure


def harmonized(groups: Sequence[Group]) -> dict[Setting, tuple[Group, Histogram]]:
    """The GHM method of every setting whose detector's histogram is the density.

    The one named `ghm`, else the first that has a strength and a histogram.
    """
    chosen: dict[Setting, tuple[Group, Histogram]] = {}
    for setting, own in by_setting(groups).items():
        for group in sorted(own, key=lambda group: group.method != "ghm"):
            histogram = histogram_of(group.runs)
            strength = number(group.runs[0].get("strength"))
            if histogram is not None and histogram.total.sum() > 0 and strength is not None:
                chosen[setting] = group, histogram
                break
    if not chosen:
        raise NothingToDrawError("no row of a method with GHM has gradient norms")
    return chosen


def reformulated(groups: Sequence[Group]) -> Figure:
    """What losses make of a gradient against what cross entropy makes of it; a panel a setting."""
    chosen = harmonized(groups)
    names = titles(chosen)
    figure, grid = panels(len(chosen), 4.4, 3.6)
    norm = np.linspace(0.0, 1.0, 201)[1:]
    for axes, (setting, (group, histogram)) in zip(grid, chosen.items(), strict=True):
        axes.plot(norm, norm, color=GREY, label="CE")
        axes.plot(norm, focal_positive(norm), color=ORANGE, label="focal, of a positive")
        axes.plot(
            norm, focal_negative(norm), color=ORANGE, linestyle="--", label="focal, of a negative"
        )
        for strength, label, color in _strengths(group):
            weights = harmonizing_weights(histogram, strength)
            axes.plot(
                histogram.centres,
                histogram.centres * weights,
                color=color,
                marker=".",
                markersize=4,
                label=label,
            )
        axes.set(yscale="log", xlim=(0, 1), xlabel=NORM)
        axes.set_ylim(
            bottom=FAINT
        )  # below it lies focal loss alone, which falls with the cube of g
        axes.set_ylabel("reformulated gradient")
        axes.grid(alpha=0.25)
        entitle(axes, f"{names[setting]}\ndensity of {group.method}")
    legend_below(figure, grid)
    return figure


def contribution(groups: Sequence[Group]) -> Figure:
    """Which gradient norms the total gradient comes from, by loss, on the same detector."""
    chosen = harmonized(groups)
    names = titles(chosen)
    figure, grid = panels(len(chosen), 4.4, 3.6)
    for axes, (setting, (group, histogram)) in zip(grid, chosen.items(), strict=True):
        lines = {"CE": ("CE", GREY), "focal": ("focal", ORANGE)}
        for strength, label, color in _strengths(group):
            lines[f"GHM {strength:g}"] = label, color
        shares = contributions(histogram, [strength for strength, _, _ in _strengths(group)])
        for name, share in shares.items():
            label, color = lines[name]
            axes.plot(histogram.centres, share, color=color, marker=".", markersize=4, label=label)
        axes.set(xlim=(0, 1), yscale="log", xlabel=NORM)
        axes.set_ylabel("share of the total gradient")
        axes.grid(alpha=0.25)
        rough = "" if histogram.gradients else "\n(norms at the middle of their regions)"
        entitle(axes, f"{names[setting]}\nentries under the detector of {group.method}{rough}")
    legend_below(figure, grid)
    return figure


def _strengths(group: Group) -> list[tuple[float, str, str]]:
    """Strengths to draw with label and colour: as trained, and the paper's."""
    trained = float(group.runs[0]["strength"])
    end = number((group.runs[0].get("options") or {}).get("strength_end"))
    fall = "" if end is None or end == trained else f" at first, {end:g} at last"
    drawn = [(trained, f"GHM, strength {trained:g}{fall} (as trained)", BLUE)]
    if trained == PAPER:
        return [(PAPER, f"GHM, strength 1{fall} (as trained; paper)", RED)]
    return [*drawn, (PAPER, "GHM, strength 1 (paper)", RED)]
