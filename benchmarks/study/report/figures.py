"""Figures of what methods achieve: AP, loss curves, sweeps, threshold policies, the initial loss.

Every function returns a figure, or raises `NothingToDrawError` where its rows are missing. Loads
matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.study.report.runs import (
    CLASSIFICATION,
    REGRESSION,
    UNGUIDED,
    Group,
    by_setting,
    guided,
    number,
    titles,
)
from benchmarks.study.report.style import (
    BLUE,
    GREY,
    RED,
    SMALL,
    NothingToDrawError,
    Style,
    entitle,
    legend_below,
    log_scale,
    panels,
)
from benchmarks.study.report.tables import (
    ANCHORS,
    CLASSES,
    SINGLE,
    field,
    macro_f1,
    policy_names,
)

POLICY_COLOURS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288")
TICKS = 5  # at most, so that long numbers do not touch
CURVES = ((CLASSIFICATION, "classification loss"), (REGRESSION, "regression loss"))


def has_ap(group: Group) -> bool:
    """Whether any seed has an AP."""
    return bool(group.values(field("ap")))


def has_curves(group: Group) -> bool:
    """Whether any seed has a loss curve."""
    return any(_curve(group, name) for name, _ in CURVES)


def lacks_classification(group: Group) -> bool:
    """Whether loss curves are there, but of a guided classification only as the guide left it."""
    return has_curves(group) and not _curve(group, CLASSIFICATION)


def has_policies(group: Group) -> bool:
    """Whether any seed has threshold policies."""
    return bool(policy_names([group]))


def average_precision(
    groups: Sequence[Group], styles: Mapping[str, Style], baseline: str
) -> Figure:
    """AP by method: a dot a seed, a bar at their mean; one panel a setting.

    The baseline's mean goes through its panel as a dashed line.
    """
    drawn = [group for group in groups if has_ap(group)]
    if not drawn:
        raise NothingToDrawError("no row has an AP")
    settings = by_setting(drawn)
    names = titles(settings)
    methods = list(dict.fromkeys(group.method for group in drawn))
    height = 0.3 * len(methods) + 1.2
    figure, grid = panels(len(settings), 4.0, height, share=True)
    for axes, (setting, own) in zip(grid, settings.items(), strict=True):
        for group in own:
            values = list(group.values(field("ap")).values())
            place, style = methods.index(group.method), styles[group.method]
            axes.plot(
                values,
                [place] * len(values),
                style.marker,
                color=style.color,
                markersize=5,
                alpha=0.65,
                linestyle="none",
                markeredgewidth=0,
            )
            mean = float(np.mean(values))
            axes.plot([mean] * 2, [place - 0.32, place + 0.32], color=style.color, linewidth=2.5)
            if group.method == baseline:
                axes.axvline(mean, color=style.color, linestyle="--", linewidth=1, zorder=0)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlabel="AP on the test split", ylim=(len(methods) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=TICKS)
        axes.grid(axis="x", alpha=0.25)
        entitle(axes, names[setting])
    return figure


def loss_curves(groups: Sequence[Group], styles: Mapping[str, Style]) -> Figure:
    """Both losses over the steps by method, means over seeds; one row of panels a setting.

    A guided classification is drawn as it was before: the guide makes it the boxes' curve again.
    """
    drawn = [group for group in groups if has_curves(group)]
    if not drawn:
        raise NothingToDrawError("no row has loss curves")
    settings = by_setting(drawn)
    names = titles(settings)
    figure, grid = panels(2 * len(settings), 5.2, 3.2, columns=2)
    for place, (setting, own) in enumerate(settings.items()):
        for axes, (name, label) in zip(grid[2 * place : 2 * place + 2], CURVES, strict=True):
            for group in own:
                curve = _curve(group, name)
                if curve:
                    style = styles[group.method]
                    axes.plot(
                        list(curve),
                        list(curve.values()),
                        color=style.color,
                        linestyle=style.linestyle,
                        linewidth=1.2,
                        label=group.method,
                    )
            log_scale(axes)
            axes.set(xlabel="step", ylabel=label, xlim=(0, setting.steps))
            axes.grid(alpha=0.25)
            entitle(axes, names[setting])
    legend_below(figure, grid)
    return figure


def _curve(group: Group, name: str) -> dict[float, float]:
    """A curve's mean over seeds by step; what is not above 0 cannot be drawn and is left out."""
    points: dict[float, list[float]] = {}
    for run in group.runs:
        curves = run.get("curves") or {}
        recorded = UNGUIDED if name == CLASSIFICATION and guided(run) else name
        pairs = zip(curves.get("step") or (), curves.get(recorded) or (), strict=False)
        for step, loss in pairs:
            value = number(loss)
            if value is not None and value > 0:
                points.setdefault(step, []).append(value)
    return {step: float(np.mean(points[step])) for step in sorted(points)}


def threshold_policies(groups: Sequence[Group]) -> Figure:
    """Macro-F1 by method and policy: means over seeds as bars, their range as whiskers."""
    drawn = [group for group in groups if has_policies(group)]
    if not drawn:
        raise NothingToDrawError("no row tells of threshold policies")
    policies = policy_names(drawn)
    settings = by_setting(drawn)
    names = titles(settings)
    methods = list(dict.fromkeys(group.method for group in drawn))
    height = 0.13 * len(methods) * len(policies) + 1.4
    figure, grid = panels(len(settings), 4.0, height, share=True)
    for axes, (setting, own) in zip(grid, settings.items(), strict=True):
        for rank in range(len(policies)):
            _policy_bars(axes, own, methods, policies, rank)
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlabel="macro-F1 on the test split", ylim=(len(methods) - 0.45, -0.55))
        axes.locator_params(axis="x", nbins=TICKS)
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        entitle(axes, names[setting])
    legend_below(figure, grid)
    return figure


def _policy_bars(
    axes: Axes, own: Sequence[Group], methods: Sequence[str], policies: Sequence[str], rank: int
) -> None:
    policy, thick = policies[rank], 0.8 / len(policies)
    found = [(group, summary) for group in own if (summary := group.summary(macro_f1(policy)))]
    if not found:
        return
    places = [methods.index(group.method) - 0.4 + (rank + 0.5) * thick for group, _ in found]
    means = [summary.mean for _, summary in found]
    reach = [
        [summary.mean - summary.low for _, summary in found],
        [summary.high - summary.mean for _, summary in found],
    ]
    single = policies[0] == SINGLE
    color = GREY if policy == SINGLE else POLICY_COLOURS[(rank - single) % len(POLICY_COLOURS)]
    label = "single (one for all classes)" if policy == SINGLE else policy
    whisker: dict[str, Any] = {"linewidth": 0.8, "ecolor": "#333333"}
    axes.barh(places, means, thick, xerr=reach, color=color, label=label, error_kw=whisker)


def initial_loss(anchors: int = ANCHORS, classes: int = CLASSES) -> Figure:
    """The loss at the start against the prior, its two parts, and the optimum. Loads torch."""
    from ghm_triton.imbalance.sampling_free import initial_loss as loss_at
    from ghm_triton.imbalance.sampling_free import optimal_prior

    counts = {"positives": 1, "counted": anchors, "classes": classes}
    priors = np.logspace(-10, np.log10(0.9), 400)
    losses = np.array([loss_at(float(prior), **counts) for prior in priors])
    best = optimal_prior(**counts)
    lowest = sum(loss_at(best, **counts))
    figure, (axes,) = panels(1, 6.0, 4.0)
    axes.plot(priors, losses[:, 0], color=BLUE, linestyle="--", label="of a positive")
    axes.plot(priors, losses[:, 1], color=RED, linestyle=":", label="of its negatives")
    axes.plot(priors, losses.sum(1), color="black", linewidth=1.8, label="sum")
    axes.plot([best], [lowest], "o", color="black", markersize=7)
    axes.annotate(
        f"optimum: prior {best:.3g}, loss {lowest:.3g}",
        (best, lowest),
        xytext=(-24, 44),
        textcoords="offset points",
        ha="right",
        fontsize=SMALL,
        arrowprops={"arrowstyle": "-", "linewidth": 0.7},
    )
    axes.set(xscale="log", yscale="log", xlabel="prior", ylabel="cross entropy a positive")
    axes.set(ylim=(1e-3, 1e6))
    axes.set_title(f"{anchors:,} anchors a positive, {classes} classes", fontsize=SMALL + 1)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=SMALL, loc="upper left")
    return figure
