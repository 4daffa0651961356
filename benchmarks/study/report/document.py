"""The report itself: every table and figure of a study, in one Markdown file. Loads matplotlib."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.study.report import figures, gradient_figures, sweeps, tables
from benchmarks.study.report.runs import Group, Study, trainings
from benchmarks.study.report.style import NothingToDrawError, Style, styles_of

FILE = "report.md"
# Sections of a grid that vary one option, a field of rows of the same name: they have figures of
# their own. Beside it, options that go with it, the axis, and what that is of too where they do.
SWEEPS = {
    "bins": (("bins",), "unit regions (bins) of GHM-C", ""),
    "strength": (("strength", "reg_strength"), "strength of GHM-C", " and GHM-R"),
}
DPI = 110


class Picture(NamedTuple):
    """A figure to draw.

    Attributes:
        name: Of the file, without suffix.
        title: For the text beside it.
        caption: What there is to know when looking at it.
        draw: Raises `NothingToDrawError` where rows are missing.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]


def write_report(study: Study, out: Path, baseline: str = "focal") -> list[Path]:
    """Write `report.md` and its pictures.

    Args:
        study: With at least one run.
        out: Folder, made where missing. Files of an earlier report are replaced.
        baseline: The method that the others are compared with.

    Returns:
        The files written, `report.md` first.

    Raises:
        ValueError: There is no run, or no run of the baseline.
    """
    groups, peers = study.groups(first=baseline), study.peers(first=baseline)
    if not groups:
        raise ValueError("there is no finished run to report on")
    methods = list(dict.fromkeys(group.method for group in peers))
    if baseline not in methods:
        raise ValueError(f"no row is of the baseline {baseline!r}; methods: {', '.join(methods)}")
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[str] = []
    missing: list[str] = []
    written = [out / FILE]
    for picture in pictures(groups, peers, baseline):
        try:
            figure = picture.draw()
        except NothingToDrawError as reason:
            missing.append(f"- {picture.title}: {reason}.")
            continue
        path = out / f"{_unused(picture.name, written)}.png"
        figure.savefig(path, dpi=DPI)
        written.append(path)
        drawn.append(f"### {picture.title}\n\n![{picture.title}]({path.name})\n\n{picture.caption}")
    parts = [*_tables(study, groups, peers, baseline), "## Figures", *drawn]
    if missing:
        parts += ["### Not drawn", "\n".join(missing)]
    written[0].write_text("\n\n".join([*parts, *_ledger(study)]) + "\n")
    return written


def pictures(groups: Sequence[Group], peers: Sequence[Group], baseline: str) -> Iterator[Picture]:
    """Every figure that a report may have, section by section.

    Args:
        groups: What is shown of a study.
        peers: All of it: a method has the same style whatever is shown, and a sweep the same line.
        baseline: The method that the others are compared with.
    """
    styles = styles_of(peers)
    shown = dict.fromkeys(group.setting.section for group in groups)
    hidden = {group.setting.section for group in peers} - shown.keys()
    for section in shown:
        if section not in SWEEPS:
            own = [group for group in groups if group.setting.section == section]
            for picture in (*_results(own, styles, baseline), *_gradients(own, styles)):
                yield picture._replace(
                    name=f"{picture.name}_{_slug(section)}", title=f"{picture.title} ({section})"
                )
    for section, (options, option, too) in SWEEPS.items():
        if section in hidden:
            continue
        label = option + too if sweeps.together(peers, section, options) else option
        yield Picture(
            f"ap_against_{section}",
            f"AP against {label}",
            "A dot is a seed, the line goes through the means; the dashed line is the mean of"
            f" {baseline} over the same seeds. A row of another section is drawn too where it was"
            f" trained with the same seed and options but for {' and '.join(options)}.",
            partial(sweeps.sweep, peers, styles, section, options, label, baseline),
        )
    yield Picture(
        "initial_loss",
        "Initial loss against prior",
        "Computed, not measured: the table of the initial loss as curves.",
        figures.initial_loss,
    )


def _results(own: Sequence[Group], styles: Mapping[str, Style], baseline: str) -> Iterator[Picture]:
    yield Picture(
        "ap",
        "AP by method",
        f"A dot is a seed, the bar their mean; the dashed line is the mean of {baseline}."
        + _without(own, figures.has_ap),
        partial(figures.average_precision, own, styles, baseline),
    )
    yield Picture(
        "losses",
        "Loss curves",
        "Means over equal stretches of steps and over seeds. Methods scale their losses"
        " differently: compare the shapes, not the heights. Of guided methods the classification is"
        " shown as it was before the guide made it as large as the boxes."
        + _named("It is not recorded of", own, figures.lacks_classification)
        + _without(own, figures.has_curves),
        partial(figures.loss_curves, own, styles),
    )
    yield Picture(
        "policies",
        "Threshold policies",
        "Thresholds chosen on the held-out split. A bar is the mean over seeds, the whisker their"
        " range." + _without(own, figures.has_policies),
        partial(figures.threshold_policies, own),
    )


def _gradients(own: Sequence[Group], styles: Mapping[str, Style]) -> Iterator[Picture]:
    yield Picture(
        "gradient_norms",
        "Gradient norms at convergence",
        "Entries (an anchor and a class) of training images by the gradient norm that the finished"
        " detector gives them, means over seeds." + _without(own, gradient_figures.has_histogram),
        partial(gradient_figures.histograms, own, styles),
    )
    yield Picture(
        "reformulated",
        "Reformulated gradient against the original",
        "What a loss makes of an entry's gradient. GHM's depends on the density: that of the method"
        " named, from the histograms above, with the released code's normalizer. Before division"
        " by the loss's own average.",
        partial(gradient_figures.reformulated, own),
    )
    yield Picture(
        "contribution",
        "Total contribution by gradient norm",
        "Entries times reformulated gradient, as shares of the whole. All losses look at the same"
        " entries: those of the method named.",
        partial(gradient_figures.contribution, own),
    )


def _without(own: Sequence[Group], has: Callable[[Group], bool]) -> str:
    """A sentence on the methods that a figure cannot show."""
    return _named("Without such rows", own, lambda group: not has(group))


def _named(what: str, own: Sequence[Group], applies: Callable[[Group], bool]) -> str:
    names = [f"{group.method} ({group.setting.label})" for group in own if applies(group)]
    return f" {what}: {'; '.join(names)}." if names else ""


def _slug(section: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]+", "_", section)


def _unused(name: str, written: Sequence[Path]) -> str:
    """A picture's name, numbered where one written before has it, in whatever case."""
    used = {path.stem.lower() for path in written[1:]}
    numbered = (f"{name}-{place}" for place in count(2))
    return next(each for each in chain([name], numbered) if each.lower() not in used)


def _tables(
    study: Study, groups: Sequence[Group], peers: Sequence[Group], baseline: str
) -> list[str]:
    return [
        "# Study",
        f"{trainings(study.runs)} trainings. AP as COCO defines it, on the test split, mean ±"
        " sample standard deviation over seeds; the best mean of a column in bold. A difference is"
        " the mean over seeds that both methods have, with its range in parentheses.",
        "## Methods",
        tables.methods(groups, baseline, peers),
        "## AP by class",
        "Means over seeds.",
        tables.classes(groups),
        "## Threshold policies",
        "Macro-F1 on the test split at thresholds chosen on the held-out split, means over seeds;"
        " `single` is the best one threshold for all classes.",
        tables.policies(groups),
        "## Initial loss by prior",
        f"Cross entropy a positive before the first step, with {tables.ANCHORS:,} anchors a"
        f" positive and {tables.CLASSES} classes.",
        tables.initial_losses(),
    ]


def _ledger(study: Study) -> list[str]:
    """Where the numbers come from, and what is not in them."""
    parts = ["## Provenance", tables.provenance(study)]
    if study.replaced:
        parts.append(f"{study.replaced} rows were measured again later; the last one counts.")
    parts += [f"The unfinished last line of {path} was dropped." for path in study.unfinished]
    if study.failures:
        parts += ["## Failed runs", tables.failures(study)]
    return parts
