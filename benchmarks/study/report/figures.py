"""Figures of a study: AP, loss curves, threshold policies, sweeps and gradient norms.

Every function returns a figure, or raises `NothingToDrawError` where its rows are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame, Series

from benchmarks.study.report.gradients import (
    SIDES,
    Histogram,
    contributions,
    focal_negative,
    focal_positive,
    harmonizing_weights,
    histogram_of,
)
from benchmarks.study.report.runs import (
    CLASSIFICATION,
    REGRESSION,
    UNGUIDED,
    baseline_of,
    by_method,
    by_setting,
    is_guided,
    peers_of,
    shown,
)
from benchmarks.study.report.style import (
    BLUE,
    GREY,
    MARKERS,
    ORANGE,
    OTHERS,
    RED,
    SMALL,
    NothingToDrawError,
    Style,
    legend_below,
    log_scale,
    panels,
)
from benchmarks.study.report.tables import ANCHORS, CLASSES, SINGLE, policy_scores, seeds_named

POLICY_COLOURS = ("#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#882255", "#999933", "#332288")
TICKS = 5  # maximum, so that long numbers do not overlap
NORM = "gradient norm  g = |p - p*|"
PAPER = 1.0  # strength
FAINT = 1e-5  # lower end of the axis: only focal loss, which falls with the cube of g, is below
CURVES = {CLASSIFICATION: "classification loss", REGRESSION: "regression loss"}


def has_ap(rows: DataFrame) -> bool:
    """Whether any row has an AP."""
    return bool(rows.ap.notna().any())


def has_curves(rows: DataFrame) -> bool:
    """Whether any row has a loss curve."""
    return any(len(mean_curve(rows, name)) for name in CURVES)


def lacks_classification(rows: DataFrame) -> bool:
    """Whether there are loss curves, but none of the classification before the guide."""
    return has_curves(rows) and mean_curve(rows, CLASSIFICATION).empty


def has_policies(rows: DataFrame) -> bool:
    """Whether any row has threshold policies."""
    return not policy_scores(rows).empty


def _methods_with(frame: DataFrame, has: Callable[[DataFrame], bool], reason: str) -> DataFrame:
    """Rows of the methods for which `has` holds in their setting."""
    kept = [rows for _, _, part in by_setting(frame) for _, rows in by_method(part) if has(rows)]
    if not kept:
        raise NothingToDrawError(reason)
    return pd.concat(kept)


def average_precision(frame: DataFrame, styles: Mapping[str, Style], baseline: str) -> Figure:
    """AP by method: a dot per seed, a bar at the mean; one panel per setting.

    A dashed line marks the baseline's mean.
    """
    drawn = _methods_with(frame, has_ap, "no row has an AP")
    height = 0.3 * drawn.method.nunique() + 1.2
    figure, grid, methods = _method_axes(drawn, height, "AP on the test split")
    for axes, (_, _, part) in zip(grid, by_setting(drawn), strict=True):
        for method, rows in by_method(part.dropna(subset="ap")):
            y, color = methods.index(method), styles[method].color
            dot = {"markersize": 5, "alpha": 0.65, "linestyle": "none", "markeredgewidth": 0}
            axes.plot(rows.ap, [y] * len(rows), styles[method].marker, color=color, **dot)
            axes.plot([rows.ap.mean()] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2.5)
            if method == baseline:
                axes.axvline(rows.ap.mean(), color=color, linestyle="--", linewidth=1, zorder=0)
    return figure


def _method_axes(
    drawn: DataFrame, height: float, label: str
) -> tuple[Figure, list[Axes], list[str]]:
    """Panels with the methods, from the top, on their vertical axis; one panel per setting."""
    methods = list(drawn.method.unique())
    figure, grid = panels([title for _, title, _ in by_setting(drawn)], 4.0, height, share=True)
    for axes in grid:
        axes.set_yticks(range(len(methods)), methods)
        axes.set(xlabel=label, ylim=(len(methods) - 0.4, -0.6))
        axes.locator_params(axis="x", nbins=TICKS)
    return figure, grid, methods


def loss_curves(frame: DataFrame, styles: Mapping[str, Style]) -> Figure:
    """Both losses over the steps by method, means over seeds; one row of panels per setting.

    A guided classification loss is drawn as it was before the guide scaled it.
    """
    drawn = _methods_with(frame, has_curves, "no row has loss curves")
    titles = [title for _, title, _ in by_setting(drawn) for _ in CURVES]
    figure, grid = panels(titles, 5.2, 3.2, columns=2)
    for row, (_, _, part) in enumerate(by_setting(drawn)):
        for axes, (name, label) in zip(grid[2 * row :], CURVES.items(), strict=False):
            for method, rows in by_method(part):
                curve = mean_curve(rows, name)
                if len(curve):
                    line = {"color": styles[method].color, "linestyle": styles[method].linestyle}
                    axes.plot(curve.index, curve, linewidth=1.2, label=method, **line)
            log_scale(axes)
            axes.set(xlabel="step", ylabel=label, xlim=(0, part.steps.iloc[0]))
    legend_below(figure, grid)
    return figure


def mean_curve(rows: DataFrame, name: str) -> Series:
    """A loss's mean over seeds by step, without values that a logarithmic axis cannot show."""
    points = [Series(dtype=float)]
    for curves in rows.curves:
        recorded = UNGUIDED if name == CLASSIFICATION and is_guided(curves) else name
        pairs = dict(zip(curves.get("step", ()), curves.get(recorded, ()), strict=False))
        points.append(Series(pairs, dtype=float))
    losses = pd.concat(points)
    return losses[losses > 0].groupby(level=0).mean()


def threshold_policies(frame: DataFrame) -> Figure:
    """Macro-F1 by method and policy: means over seeds as bars, their range as whiskers."""
    drawn = _methods_with(frame, has_policies, "no row has threshold policies")
    scores = policy_scores(drawn)
    height = 0.13 * drawn.method.nunique() * len(scores.columns) + 1.4
    figure, grid, methods = _method_axes(drawn, height, "macro-F1 on the test split")
    thick = 0.8 / len(scores.columns)
    for axes, (_, _, part) in zip(grid, by_setting(drawn), strict=True):
        for rank, policy in enumerate(scores):
            values = scores[policy][part.index].groupby(part.method, sort=False)
            bars = values.agg(["mean", "min", "max"]).dropna()
            if bars.empty:
                continue
            places = [methods.index(name) - 0.4 + (rank + 0.5) * thick for name in bars.index]
            color, label = GREY, "single (one for all classes)"
            if policy != SINGLE:
                others = rank - (SINGLE in scores)
                color, label = POLICY_COLOURS[others % len(POLICY_COLOURS)], policy
            reach = [bars["mean"] - bars["min"], bars["max"] - bars["mean"]]
            look = {"color": color, "error_kw": {"linewidth": 0.8, "ecolor": "#333333"}}
            axes.barh(places, bars["mean"], thick, xerr=reach, label=label, **look)
    legend_below(figure, grid)
    return figure


def initial_loss(anchors: int = ANCHORS, classes: int = CLASSES) -> Figure:
    """Initial loss against the prior, its two parts, and the optimum. Loads torch."""
    from ghm_triton.imbalance.sampling_free import initial_loss as loss_at
    from ghm_triton.imbalance.sampling_free import optimal_prior

    counts = {"positives": 1, "counted": anchors, "classes": classes}
    priors = np.logspace(-10, np.log10(0.9), 400)
    losses = np.array([loss_at(float(prior), **counts) for prior in priors])
    best = optimal_prior(**counts)
    lowest = sum(loss_at(best, **counts))
    title = f"{anchors:,} anchors per positive, {classes} classes"
    figure, (axes,) = panels([title], 6.0, 4.0)
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
    axes.set(xscale="log", yscale="log", xlabel="prior", ylabel="cross entropy per positive")
    axes.set(ylim=(1e-3, 1e6))
    axes.legend(frameon=False, fontsize=SMALL, loc="upper left")
    return figure


def sweep(
    everything: DataFrame,
    styles: Mapping[str, Style],
    section: str,
    options: Sequence[str],
    label: str,
    baseline: str,
) -> Figure:
    """AP against an option that a section of the grid varies; one panel per setting.

    Args:
        everything: All rows of the study.
        styles: Styles of its methods.
        section: The section that varies the option.
        options: The option, a column of the rows, and others that change with it.
        label: Label of the horizontal axis.
        baseline: The method whose mean over the section's seeds is drawn as a horizontal line.
    """
    settings = [
        (title, part, points)
        for _, title, part in by_setting(everything[everything.section == section])
        if not (points := sweep_points(part, everything, options)).empty
    ]
    if not settings:
        raise NothingToDrawError(f"there is no AP by {options[0]} in section {section!r}")
    figure, grid = panels([title for title, _, _ in settings], 4.2, 3.4)
    for axes, (_, part, points) in zip(grid, settings, strict=True):
        for place, (name, line) in enumerate(points.groupby("line", sort=False)):
            color, marker = (BLUE, *OTHERS)[place % 8], MARKERS[place % 4]
            means = line.groupby("value").ap.mean()
            look = {"color": color, "marker": marker, "markersize": 5}
            axes.plot(means.index, means, label=name or _averaged(line), **look)
            for value, rows in line.groupby("value"):
                dots = [value] * len(rows), rows.ap, "."
                axes.plot(*dots, color=color, alpha=0.45, markersize=6)
        reference = baseline_of(part, everything, baseline)
        mean = reference.ap[reference.seed.isin(part.dropna(subset="ap").seed)].mean()
        if not np.isnan(mean):
            look = {"color": styles[baseline].color, "linestyle": "--", "linewidth": 1.2}
            axes.axhline(mean, label=baseline, **look)
        axes.set(xlabel=label, ylabel="AP on the test split")
    legend_below(figure, grid)
    return figure


def sweep_points(part: DataFrame, everything: DataFrame, options: Sequence[str]) -> DataFrame:
    """Points of a sweep's lines: `line`, `value`, `seed` and `ap`, one row per training.

    A line joins rows that were trained with equal options but for the varied ones, which `line`
    lists (empty for the defaults). Rows of other sections belong to a line too, unless the section
    has that value itself or not that seed, or their section was trained with other defaults.

    Args:
        part: Rows of the sweep's section, of one setting.
        everything: All rows of the study.
        options: The varied option, and others that change with it.
    """
    own = part.assign(trained=[_trained(row) for row in part.itertuples()])
    others = peers_of(part, everything)
    others = others[others.section != part.section.iloc[0]]
    others = others[others.seed.isin(part.dropna(subset="ap").seed)]
    others = others.assign(trained=[_trained(row) for row in others.itertuples()])
    # Rows do not record the defaults, but under equal defaults equal options have equal recipes.
    recipes = own.recipe.map(shown).groupby(own.trained).agg(set)
    conflicts = [
        trained in recipes and shown(recipe) not in recipes[trained]
        for trained, recipe in zip(others.trained, others.recipe, strict=True)
    ]
    others = others[~others.section.isin(others.section[conflicts])]
    rows = pd.concat([own, others])
    rows["line"] = [_line(row, options) for row in rows.itertuples()]
    # Seeds of one method with several recipes: a default changed between them.
    groups = [rows.section, rows.method]
    mixed = rows.recipe.map(shown).groupby(groups).transform("nunique") > 1
    recipe = "recipe " + rows.recipe.map(shown)
    joined = (rows.line + ", " + recipe).str.removeprefix(", ")
    rows["line"] = rows.line.where(~mixed, joined)
    rows = rows[rows.line.isin(rows.line[rows.section == part.section.iloc[0]])]
    rows["value"] = rows[options[0]]
    rows = rows.dropna(subset=["value", "ap"])
    source = rows.section + "\0" + rows.method
    first = source.groupby([rows.line, rows.value]).transform("first")
    return rows.loc[source == first, ["line", "value", "seed", "ap"]]


def _trained(row: object) -> str:
    return shown([row.options, row.config])


def _line(row: object, options: Sequence[str]) -> str:
    trained = {**row.options, **row.config}
    return ", ".join(f"{k}={shown(trained[k])}" for k in sorted(trained) if k not in options)


def _averaged(line: DataFrame) -> str:
    """Label of a line of defaults: means, or its seeds where no point has two."""
    if line.value.duplicated().any():
        return "mean over seeds"
    return seeds_named(sorted(line.seed.unique()))


def vary_together(everything: DataFrame, section: str, options: Sequence[str]) -> bool:
    """Whether the section's rows that set the first of some options set all of them."""
    trained = everything.options[everything.section == section]
    moved = [found for found in trained if options[0] in found]
    return bool(moved) and all(name in found for found in moved for name in options)


def has_histogram(rows: DataFrame) -> bool:
    """Whether any row has gradient norms."""
    return histogram_of(rows.gradient_norms) is not None


def histograms(frame: DataFrame, styles: Mapping[str, Style]) -> Figure:
    """Entries by gradient norm under the trained detectors, by method; positives and negatives."""
    drawn = _methods_with(frame, has_histogram, "no row has gradient norms")
    titles = [title for _, title, _ in by_setting(drawn) for _ in SIDES]
    figure, grid = panels(titles, 5.2, 3.2, columns=2)
    for row, (_, _, part) in enumerate(by_setting(drawn)):
        for axes, side in zip(grid[2 * row :], SIDES, strict=False):
            for method, rows in by_method(part):
                histogram = histogram_of(rows.gradient_norms)
                counts = getattr(histogram, side)
                axes.stairs(
                    np.where(counts > 0, counts, np.nan),
                    histogram.edges,
                    baseline=None,
                    color=styles[method].color,
                    linestyle=styles[method].linestyle,
                    linewidth=1.3,
                    label=method,
                )
            axes.set(yscale="log", xlim=(0, 1), xlabel=NORM, ylabel=f"{side} (entries)")
    legend_below(figure, grid)
    return figure


def harmonized(frame: DataFrame) -> dict[str, tuple[DataFrame, Histogram]]:
    """Find the GHM method whose detector's histogram serves as the density, by setting's title.

    It is the one named `ghm`, else the first that has a strength and a histogram.
    """
    chosen: dict[str, tuple[DataFrame, Histogram]] = {}
    for _, title, part in by_setting(frame):
        for _, rows in sorted(by_method(part), key=lambda pair: pair[0] != "ghm"):
            histogram = histogram_of(rows.gradient_norms)
            trained = not np.isnan(rows.strength.iloc[0])
            if trained and histogram is not None and histogram.total.sum() > 0:
                chosen[title] = rows, histogram
                break
    if not chosen:
        raise NothingToDrawError("no row of a method with GHM has gradient norms")
    return chosen


def reformulated(frame: DataFrame) -> Figure:
    """Gradient of every loss against that of cross entropy; one panel per setting."""
    chosen = harmonized(frame)
    titles = [f"{title}\ndensity of {rows.method.iloc[0]}" for title, (rows, _) in chosen.items()]
    figure, grid = panels(titles, 4.4, 3.6)
    norm = np.linspace(0.0, 1.0, 201)[1:]
    for axes, (rows, histogram) in zip(grid, chosen.values(), strict=True):
        axes.plot(norm, norm, color=GREY, label="CE")
        axes.plot(norm, focal_positive(norm), color=ORANGE, label="focal, of a positive")
        negative = {"linestyle": "--", "label": "focal, of a negative"}
        axes.plot(norm, focal_negative(norm), color=ORANGE, **negative)
        for strength, (label, color) in _strengths(rows).items():
            gradients = histogram.centres * harmonizing_weights(histogram, strength)
            dots = {"marker": ".", "markersize": 4}
            axes.plot(histogram.centres, gradients, color=color, label=label, **dots)
        axes.set(yscale="log", xlim=(0, 1), xlabel=NORM, ylabel="reformulated gradient")
        axes.set_ylim(bottom=FAINT)
    legend_below(figure, grid)
    return figure


def contribution(frame: DataFrame) -> Figure:
    """Share of every gradient norm in the total gradient, by loss, on the same detector."""
    chosen = harmonized(frame)
    titles = [
        f"{title}\nentries under the detector of {rows.method.iloc[0]}"
        + ("" if histogram.gradients else "\n(norms at the middle of their regions)")
        for title, (rows, histogram) in chosen.items()
    ]
    figure, grid = panels(titles, 4.4, 3.6)
    for axes, (rows, histogram) in zip(grid, chosen.values(), strict=True):
        strengths = _strengths(rows)
        looks = [("CE", GREY), ("focal", ORANGE), *strengths.values()]
        shares = contributions(histogram, strengths)
        for (label, color), share in zip(looks, shares.values(), strict=True):
            axes.plot(histogram.centres, share, color=color, marker=".", markersize=4, label=label)
        axes.set(xlim=(0, 1), yscale="log", xlabel=NORM, ylabel="share of the total gradient")
    legend_below(figure, grid)
    return figure


def _strengths(rows: DataFrame) -> dict[float, tuple[str, str]]:
    """Label and colour of the strengths to draw: as trained, and the paper's."""
    trained, end = rows.strength.iloc[0], rows.options.iloc[0].get("strength_end")
    fall = "" if end is None or end == trained else f" at first, {end:g} at last"
    if trained == PAPER:
        return {PAPER: (f"GHM, strength 1{fall} (as trained; paper)", RED)}
    label = f"GHM, strength {trained:g}{fall} (as trained)"
    return {trained: (label, BLUE), PAPER: ("GHM, strength 1 (paper)", RED)}
