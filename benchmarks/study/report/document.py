"""The report: every table and figure of a study in one Markdown file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from pandas import DataFrame

from benchmarks.study.report import figures, tables
from benchmarks.study.report.runs import Study, by_method, by_setting
from benchmarks.study.report.style import NothingToDrawError, Style, styles_of

FILE = "report.md"
# Sections of a grid that vary one option, a column of the same name, have figures of their own:
# the options that vary, the label of the axis, and its end where all of them vary together.
SWEEPS = {
    "bins": (("bins",), "unit regions (bins) of GHM-C", ""),
    "strength": (("strength", "reg_strength"), "strength of GHM-C", " and GHM-R"),
}
DPI = 110


class Picture(NamedTuple):
    """A figure to draw.

    Attributes:
        name: File name without suffix.
        title: Heading in the report.
        caption: Text below the figure.
        draw: Draws it; raises `NothingToDrawError` where rows are missing.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def write_report(study: Study, out: Path, baseline: str = "focal") -> list[Path]:
    """Write `report.md` and its figures.

    Args:
        study: A study with at least one run.
        out: Folder, created if missing. Files of an earlier report are replaced.
        baseline: The method that the others are compared with.

    Returns:
        The files written, `report.md` first.

    Raises:
        ValueError: There is no run, or no run of the baseline.
    """
    if study.runs.empty:
        raise ValueError("there is no finished run to report on")
    methods = list(study.everything.method.unique())
    if baseline not in methods:
        raise ValueError(f"no row is of the baseline {baseline!r}; methods: {', '.join(methods)}")
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[str] = []
    missing: list[str] = []
    written = [out / FILE]
    for picture in pictures(study, baseline):
        try:
            figure = picture.draw()
        except NothingToDrawError as reason:
            missing.append(f"- {picture.title}: {reason}.")
            continue
        path = out / f"{_unused(picture.name, written)}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
        drawn.append(f"### {picture.title}\n\n![{picture.title}]({path.name})\n\n{picture.caption}")
    parts = [*_tables(study, baseline), "## Figures", *drawn]
    if missing:
        parts += ["### Not drawn", "\n".join(missing)]
    written[0].write_text("\n\n".join([*parts, *_sources(study)]) + "\n")
    return written


def pictures(study: Study, baseline: str) -> Iterator[Picture]:
    """Every figure that a report may have, section by section."""
    # Styles and sweeps are of all rows, so that they are the same whatever sections are shown.
    frame, everything = study.runs, study.everything
    styles = styles_of(everything)
    shown = list(frame.section.unique())
    for section in shown:
        if section not in SWEEPS:
            rows = frame[frame.section == section]
            for picture in (*_results(rows, styles, baseline), *_gradients(rows, styles)):
                slug = re.sub(r"[^A-Za-z0-9-]+", "_", section)
                title = f"{picture.title} ({section})"
                yield picture._replace(name=f"{picture.name}_{slug}", title=title)
    for section, (options, option, both) in SWEEPS.items():
        if section not in shown and section in everything.section.unique():
            continue
        label = option + both if figures.vary_together(everything, section, options) else option
        yield Picture(
            f"ap_against_{section}",
            f"AP against {label}",
            "A dot is a seed, the line joins the means; the dashed line is the mean of"
            f" {baseline} over the same seeds. Rows of other sections with the same seed and the"
            f" same options except {' and '.join(options)} are included.",
            partial(figures.sweep, everything, styles, section, options, label, baseline),
        )
    yield Picture(
        "initial_loss",
        "Initial loss against prior",
        "Computed, not measured: the table of the initial loss as curves.",
        figures.initial_loss,
    )


def _results(rows: DataFrame, styles: Mapping[str, Style], baseline: str) -> Iterator[Picture]:
    yield Picture(
        "ap",
        "AP by method",
        f"A dot is a seed, the bar the mean; the dashed line is the mean of {baseline}."
        + _without(rows, figures.has_ap),
        partial(figures.average_precision, rows, styles, baseline),
    )
    yield Picture(
        "losses",
        "Loss curves",
        "Means over equal stretches of steps and over seeds. Methods scale their losses"
        " differently: compare the shapes, not the heights. Of guided methods the classification"
        " loss is shown as it was before the guide scaled it to the boxes."
        + _named("It is not recorded of", rows, figures.lacks_classification)
        + _without(rows, figures.has_curves),
        partial(figures.loss_curves, rows, styles),
    )
    yield Picture(
        "policies",
        "Threshold policies",
        "Thresholds chosen on the held-out split. A bar is the mean over seeds, the whisker their"
        " range." + _without(rows, figures.has_policies),
        partial(figures.threshold_policies, rows),
    )


def _gradients(rows: DataFrame, styles: Mapping[str, Style]) -> Iterator[Picture]:
    yield Picture(
        "gradient_norms",
        "Gradient norms at convergence",
        "Entries (an anchor and a class) of training images by gradient norm under the trained"
        " detector, means over seeds." + _without(rows, figures.has_histogram),
        partial(figures.histograms, rows, styles),
    )
    yield Picture(
        "reformulated",
        "Reformulated gradient against the original",
        "Gradient of an entry under each loss, before division by the loss's own average. GHM's"
        " depends on the density: that of the method named, from the histograms above, with the"
        " released code's normalizer.",
        partial(figures.reformulated, rows),
    )
    yield Picture(
        "contribution",
        "Total contribution by gradient norm",
        "Entries times reformulated gradient, as shares of the whole, for the same entries under"
        " all losses: those of the method named.",
        partial(figures.contribution, rows),
    )


def _without(rows: DataFrame, has: Callable[[DataFrame], bool]) -> str:
    """A sentence that lists the methods missing from a figure."""
    return _named("Without such rows", rows, lambda group: not has(group))


def _named(what: str, rows: DataFrame, applies: Callable[[DataFrame], bool]) -> str:
    names = [
        f"{method} ({group.label.iloc[0]})"
        for _, _, part in by_setting(rows)
        for method, group in by_method(part)
        if applies(group)
    ]
    return f" {what}: {'; '.join(names)}." if names else ""


def _unused(name: str, written: Sequence[Path]) -> str:
    """The name, numbered if a figure already has it, ignoring case."""
    used = {path.stem.lower() for path in written[1:]}
    candidates = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(each for each in candidates if each.lower() not in used)


def _tables(study: Study, baseline: str) -> list[str]:
    frame = study.runs
    return [
        "# Study",
        f"{frame.training.nunique()} trainings. AP as COCO defines it, on the test split, mean ±"
        " sample standard deviation over seeds; the best mean of a column in bold. A difference is"
        " the mean over seeds that both methods have, with its range in parentheses.",
        "## Methods",
        tables.methods(frame, baseline, study.everything),
        "## AP by class",
        "Means over seeds.",
        tables.classes(frame),
        "## Threshold policies",
        "Macro-F1 on the test split at thresholds chosen on the held-out split, means over seeds;"
        " `single` is the best one threshold for all classes.",
        tables.policies(frame),
        "## Initial loss by prior",
        f"Cross entropy per positive before the first step, with {tables.ANCHORS:,} anchors per"
        f" positive and {tables.CLASSES} classes.",
        tables.initial_losses(),
    ]


def _sources(study: Study) -> list[str]:
    """Provenance of the numbers, and rows that are missing from them."""
    parts = ["## Provenance", tables.provenance(study)]
    if study.replaced:
        parts.append(f"{study.replaced} rows were measured again later; the last one counts.")
    parts += [f"The unfinished last line of {path} was dropped." for path in study.unfinished]
    if study.failures:
        parts += ["## Failed runs", tables.failures(study)]
    return parts
