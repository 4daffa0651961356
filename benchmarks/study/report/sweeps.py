"""AP against an option that a section of the grid varies. Loads matplotlib."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.report.runs import (
    Group,
    Run,
    baseline_of,
    by_setting,
    number,
    shown,
    titles,
)
from benchmarks.study.report.style import (
    BLUE,
    MARKERS,
    OTHERS,
    NothingToDrawError,
    Style,
    entitle,
    legend_below,
    panels,
)
from benchmarks.study.report.tables import field

AP = field("ap")
Points = dict[float, dict[int, float]]  # AP by seed, by the value that was changed


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
        baseline: The method whose mean over the section's seeds is drawn as a horizontal line.
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
        seeds = _seeds(group for group in varied if group.setting == setting)
        mean = other and _only(other, seeds).summary(AP)
        if mean:
            color = styles[baseline].color
            axes.axhline(mean.mean, color=color, linestyle="--", linewidth=1.2, label=baseline)
        axes.set(xlabel=label, ylabel="AP on the test split")
        axes.grid(alpha=0.25)
        entitle(axes, names[setting])
    legend_below(figure, grid)
    return figure


def together(groups: Sequence[Group], section: str, options: Sequence[str]) -> bool:
    """Whether the section's rows that moved the first of some options moved all of them."""
    found = [
        moved
        for group in groups
        if group.setting.section == section
        for run in group.runs
        if options[0] in (moved := run.get("options") or {})
    ]
    return bool(found) and all(name in moved for moved in found for name in options)


def sweeps_of(own: Sequence[Group], groups: Sequence[Group], options: Sequence[str]) -> list[Sweep]:
    """The lines of a sweep's panel: one for each set of other options.

    Args:
        own: Groups of the sweep's section, of one setting.
        groups: Of the whole study: where another section trained with the same options but for
            those varied, its row belongs to the line, unless the section has that value itself, not
            that seed, or defaults were other ones there.
        options: The option, and others that go with it.
    """
    lines: dict[str, Points] = {}
    for group in own:
        for others, part in _parts(group, options).items():
            _add(lines.setdefault(others, {}), part, options[0])
    for group in _elsewhere(own, groups):
        for others, part in _parts(group, options).items():
            if others in lines:
                _add(lines[others], part, options[0])
    return [
        Sweep(
            others or _seeds_named(points),
            {value: list(points[value].values()) for value in sorted(points)},
        )
        for others, points in lines.items()
        if points
    ]


def _elsewhere(own: Sequence[Group], groups: Sequence[Group]) -> list[Group]:
    """Groups of other sections that compare with `own`: of its setting, seeds and defaults."""
    section, seeds = own[0].setting.section, _seeds(own)
    found = [
        _only(group, seeds)
        for group in groups
        if group.setting.section != section and group.setting.peers == own[0].setting.peers
    ]
    strange = _sections_of_other_defaults(own, found)
    return [group for group in found if group.setting.section not in strange]


def _sections_of_other_defaults(own: Sequence[Group], others: Sequence[Group]) -> set[str]:
    """Sections of `others` that trained anything that `own` did with another recipe.

    Rows do not tell the defaults themselves, but with the same defaults equal options have equal
    recipes.
    """
    recipes: dict[str, set[str]] = {}
    for run in (run for group in own for run in group.runs):
        recipes.setdefault(_trained(run), set()).add(_recipe(run))
    return {
        group.setting.section
        for group in others
        for run in group.runs
        if _recipe(run) not in recipes.get(_trained(run), {_recipe(run)})
    }


def _seeds(groups: Iterable[Group]) -> set[int]:
    """Seeds that any of the groups has an AP of."""
    return {seed for group in groups for seed in group.values(AP)}


def _only(group: Group, seeds: set[int]) -> Group:
    return replace(group, runs=tuple(run for run in group.runs if run["seed"] in seeds))


def _parts(group: Group, options: Sequence[str]) -> dict[str, Group]:
    """A group by what its runs were trained with beside the options that vary.

    By recipe too where the seeds differ in it: then a default has changed between them.
    """
    mixed = "recipe" in group.disagreements()
    parts: dict[str, list[Run]] = {}
    for run in group.runs:
        words = [_others(run, options), f"recipe {_recipe(run)}" if mixed else ""]
        parts.setdefault(", ".join(filter(None, words)), []).append(run)
    return {others: replace(group, runs=tuple(runs)) for others, runs in parts.items()}


def _add(points: Points, part: Group, option: str) -> None:
    """Add a group's point, unless there is one."""
    value, each = number(part.runs[0].get(option)), part.values(AP)
    if value is not None and each:
        points.setdefault(value, each)


def _seeds_named(points: Points) -> str:
    """What a line goes through: means, or the seeds where no point has two."""
    if any(len(each) > 1 for each in points.values()):
        return "mean over seeds"
    seeds = sorted({seed for each in points.values() for seed in each})
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def _recipe(run: Run) -> str:
    return shown(run.get("recipe"))


def _trained(run: Run) -> str:
    return shown([run.get("options") or {}, run.get("config") or {}])


def _others(run: Run, options: Sequence[str]) -> str:
    """What a run was trained with beside the defaults and the options that vary."""
    trained = {**(run.get("options") or {}), **(run.get("config") or {})}
    return ", ".join(f"{k}={shown(trained[k])}" for k in sorted(trained) if k not in options)


def _draw(axes: Axes, line: Sweep, color: str, marker: str) -> None:
    means = [float(np.mean(each)) for each in line.points.values()]
    axes.plot(list(line.points), means, color=color, marker=marker, markersize=5, label=line.label)
    for value, each in line.points.items():
        axes.plot([value] * len(each), each, ".", color=color, alpha=0.45, markersize=6)
