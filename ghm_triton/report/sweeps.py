"""AP against an option that a section of the grid varies. Loads matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ghm_triton.report.runs import (
    Group,
    Run,
    baseline_of,
    by_setting,
    number,
    shown,
    titles,
)
from ghm_triton.report.style import (
    BLUE,
    MARKERS,
    OTHERS,
    NothingToDrawError,
    Style,
    entitle,
    legend_below,
    panels,
)
from ghm_triton.report.tables import field


class Sweep(NamedTuple):
    """A line of a sweep: AP of every seed by the value that was changed, other options equal.

    Attributes:
        label: The other options that differ from the defaults.
        points: AP of every seed by the value.
    """

    label: str
    points: dict[float, list[float]]


def sweep(
    groups: Sequence[Group],
    styles: Mapping[str, Style],
    section: str,
    options: Sequence[str],
    label: str,
    baseline: str,
) -> Figure:
    """AP against an option that a section of the grid varies; one panel a setting.

    Args:
        groups: Of the whole study.
        styles: Of its methods.
        section: The section that varies the option.
        options: The option, a field of rows, and others that go with it.
        label: Of the horizontal axis.
        baseline: The method whose mean is drawn as a horizontal line.
    """
    varied = [group for group in groups if group.setting.section == section]
    lines = {
        setting: sweeps_of(own, groups, options) for setting, own in by_setting(varied).items()
    }
    lines = {setting: found for setting, found in lines.items() if found}
    if not lines:
        raise NothingToDrawError(f"there is no AP by {options[0]} in section {section!r}")
    names = titles(lines)
    figure, grid = panels(len(lines), 4.2, 3.4)
    for axes, (setting, found) in zip(grid, lines.items(), strict=True):
        for place, line in enumerate(found):
            _draw(axes, line, (BLUE, *OTHERS)[place % 8], MARKERS[place % 4])
        own = next(group for group in varied if group.setting == setting)
        other = baseline_of(own, groups, baseline)
        mean = other and other.summary(field("ap"))
        if mean:
            color = styles[baseline].color
            axes.axhline(mean.mean, color=color, linestyle="--", linewidth=1.2, label=baseline)
        axes.set(xlabel=label, ylabel="AP on the test split")
        axes.grid(alpha=0.25)
        entitle(axes, names[setting])
    legend_below(figure, grid)
    return figure


def sweeps_of(own: Sequence[Group], groups: Sequence[Group], options: Sequence[str]) -> list[Sweep]:
    """The lines of a sweep's panel: one for each set of other options.

    Args:
        own: Groups of the sweep's section, of one setting.
        groups: Of the whole study: where another section trained with the same options but for
            those varied, its row belongs to the line, unless the section has that value itself.
        options: The option, and others that go with it.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    for group in own:
        _add(lines.setdefault(_others(group.runs[0], options), {}), group, options[0])
    section, *peers = own[0].setting
    for group in groups:
        others = _others(group.runs[0], options)
        elsewhere = group.setting.section != section and [*group.setting.peers] == peers
        if elsewhere and others in lines:
            _add(lines[others], group, options[0])
    return [
        Sweep(others or "mean over seeds", dict(sorted(points.items())))
        for others, points in lines.items()
        if points
    ]


def _add(points: dict[float, list[float]], group: Group, option: str) -> None:
    """Add a group's point, unless there is one."""
    value, each = number(group.runs[0].get(option)), list(group.values(field("ap")).values())
    if value is not None and each:
        points.setdefault(value, each)


def _others(run: Run, options: Sequence[str]) -> str:
    """What a run was trained with beside the defaults and the options that vary."""
    trained = {**(run.get("options") or {}), **(run.get("config") or {})}
    return ", ".join(f"{k}={shown(trained[k])}" for k in sorted(trained) if k not in options)


def _draw(axes: Axes, line: Sweep, color: str, marker: str) -> None:
    means = [float(np.mean(each)) for each in line.points.values()]
    axes.plot(list(line.points), means, color=color, marker=marker, markersize=5, label=line.label)
    for value, each in line.points.items():
        axes.plot([value] * len(each), each, ".", color=color, alpha=0.45, markersize=6)
