"""A study's tables in Markdown: methods, classes, threshold policies, initial loss, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

from benchmarks.study.report.runs import ORIGIN, Run, Study, baseline_of, by_setting, shown

NOTHING = "-"
AVERAGES = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}
SINGLE, F1 = "single", "f1"  # policies: the best one threshold for all classes, and one per class
# Anchors per positive and number of classes, about those of RetinaNet on COCO.
ANCHORS, CLASSES = 1000, 80
PRIORS = (0.5, 1e-2, 1e-5, 1e-10)


def markdown(cells: DataFrame, left: Sequence[str] = ()) -> str:
    """Format text as a Markdown table.

    Args:
        cells: Texts; the index becomes the first column, under its name.
        left: Left-aligned columns beside the index; the others are right-aligned.
    """
    text = cells.reset_index().map(lambda cell: str(cell).replace("|", "\\|"))
    sides = ["left" if name in (cells.index.name, *left) else "right" for name in text]
    return text.to_markdown(index=False, colalign=sides, disable_numparse=True)


def spread(values: Series, methods: Series, digits: int = 3, *, deviation: bool = True) -> Series:
    """Mean ± sample standard deviation of every method; the mean alone of a single value."""
    found = values.astype(float).groupby(methods, sort=False).agg(["mean", "std"])
    texts = found["mean"].map(f"{{:.{digits}f}}".format)
    if deviation:
        texts += found["std"].map(f" ± {{:.{digits}f}}".format).where(found["std"].notna(), "")
    return texts.where(found["mean"].notna(), NOTHING)


def bold_best(texts: Series, values: Series, methods: Series) -> Series:
    """Set the method with the highest mean in bold, unless it is the only one."""
    means = values.astype(float).groupby(methods, sort=False).mean()
    return texts.where((means != means.max()) | (means.count() < 2), "**" + texts + "**")


def difference(deltas: Series, seeds: int) -> str:
    """Mean and range of differences, and the number of seeds where it is less than `seeds`."""
    deltas = deltas.dropna()
    if deltas.empty:
        return NOTHING
    text = f"{deltas.mean():+.3f}"
    if len(deltas) > 1:
        text += f" ({deltas.min():+.3f} to {deltas.max():+.3f})"
    return text + (f", {len(deltas)} of {seeds} seeds" if len(deltas) < seeds else "")


def methods(frame: DataFrame, baseline: str, everything: DataFrame) -> str:
    """Table per setting: AP by method over seeds, difference to the baseline, time per step.

    Args:
        frame: The rows to show.
        baseline: The method that the others are compared with, paired by seed.
        everything: All rows of the study, among which the baseline is looked up.
    """
    return _per_setting(frame, lambda part: _methods(part, everything, baseline))


def _methods(part: DataFrame, everything: DataFrame, baseline: str) -> str:
    groups = part.groupby("method", sort=False)
    table = DataFrame({"seeds": groups.seed.agg(_listed)})
    for name, column in AVERAGES.items():
        texts = spread(part[column], part.method)
        table[name] = bold_best(texts, part[column], part.method)
    notes = _mixtures(part)
    reference = baseline_of(part, everything, baseline)
    if reference.empty:
        notes.append(f"There is no row of {baseline} to compare with.")
    elif reference.section.iloc[0] != part.section.iloc[0]:
        notes.append(f"{baseline} is that of section {reference.section.iloc[0]}.")
    paired = part.ap - part.seed.map(reference.set_index("seed").ap)
    table[f"AP against {baseline}"] = [
        "baseline" if method == baseline else difference(paired[rows.index], len(rows))
        for method, rows in groups
    ]
    table["ms per step"] = spread(part.step_ms, part.method, 1)
    sharing = sorted(part.parallel.fillna(1).unique())
    if sharing != [1]:
        notes.append(f"Runs that shared the machine while steps were timed: {_listed(sharing)}.")
    mixed = [f"{method} †" if _disagreements(rows) else method for method, rows in groups]
    table.index = pd.Index(mixed, name="method")
    return "\n\n".join([markdown(table, left=["seeds"]), *notes])


def _disagreements(rows: DataFrame) -> dict[str, Series]:
    """Fields of ORIGIN in which the seeds of a method differ: lists of seeds by value."""
    found = {name: rows.seed.groupby(rows[name].map(shown), sort=False) for name in ORIGIN}
    return {name: seeds.agg(list) for name, seeds in found.items() if seeds.ngroups > 1}


def _mixtures(part: DataFrame) -> list[str]:
    """Footnotes on rows of one table that differ in more than method and seed."""
    notes = []
    for method, rows in part.groupby("method", sort=False):
        for name, seeds in _disagreements(rows).items():
            parts = "; ".join(f"{value} ({seeds_named(of)})" for value, of in seeds.items())
            notes.append(f"† {method}: seeds differ in {name}: {parts}.")
    for name in ("cpu", "gpu", "source", "commit", "versions"):
        values = part[name].map(shown).unique()
        if len(values) > 1:
            notes.append(f"Rows of this table differ in {name}: {_listed(values)}.")
    return notes


def seeds_named(seeds: Sequence[int]) -> str:
    """`seed 1` or `seeds 1, 2`."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {_listed(seeds)}"


def classes(frame: DataFrame) -> str:
    """Table per setting: AP and AP50 of every class by method, means over seeds."""
    return _per_setting(frame, _classes)


def _classes(part: DataFrame) -> str:
    tables = []
    for position, title in enumerate(AVERAGES):
        values = class_precision(part, position)
        if values.empty or position > 1:
            break
        texts = {
            name: bold_best(spread(column, part.method, deviation=False), column, part.method)
            for name, column in values.items()
        }
        tables.append(markdown(DataFrame(texts).rename_axis(f"{title} of class")))
    return "\n\n".join(tables) or "No row has AP by class."


def class_precision(part: DataFrame, position: int) -> DataFrame:
    """AP (position 0) or AP50 (1) of every class, by row."""
    pairs = DataFrame(list(part.ap_per_class), index=part.index)
    return pairs.map(
        lambda pair: pair[position] if isinstance(pair, list) and len(pair) > position else None
    ).astype(float)


def policies(frame: DataFrame) -> str:
    """Table per setting: macro-F1 of every threshold policy by method, means over seeds.

    The last column is the gain from one threshold per class: policy f1 minus the best single
    threshold, paired by seed, with its range.
    """
    return _per_setting(frame, _policies)


def _policies(part: DataFrame) -> str:
    scores = policy_scores(part)
    if scores.empty:
        return "No row has threshold policies."
    texts = {name: spread(scores[name], part.method, deviation=False) for name in scores}
    gain = scores.get(F1, np.nan) - scores.get(SINGLE, Series(np.nan, part.index))
    texts[f"{F1} minus {SINGLE}"] = gain.groupby(part.method, sort=False).agg(
        lambda deltas: difference(deltas, len(deltas))
    )
    return markdown(DataFrame(texts).rename_axis("macro-F1 of method"))


def policy_scores(part: DataFrame) -> DataFrame:
    """Macro-F1 on the test split by row and policy, `single` first."""
    scores = [
        {name: (policy or {}).get("macro_f1") for name, policy in found.items()}
        for found in part.policies
    ]
    frame = DataFrame(scores, index=part.index).astype(float)
    return frame[sorted(frame, key=lambda name: name != SINGLE)]


def initial_losses(anchors: int = ANCHORS, classes: int = CLASSES) -> str:
    """Table of the cross entropy per positive before the first step, by the bias's prior.

    Section 3 of arXiv 1909.04868. Loads torch.

    Args:
        anchors: Anchors per positive anchor, `N / N_f`.
        classes: Number of classes, `C`.
    """
    from ghm_triton.imbalance.sampling_free import initial_loss, optimal_prior

    counts = {"positives": 1, "counted": anchors, "classes": classes}
    best = optimal_prior(**counts)
    rows = {}
    for prior in sorted((*PRIORS, best), reverse=True):
        loss = initial_loss(prior, **counts)
        name = f"{prior:g}" + (" (optimal)" if prior == best else "")
        rows[name] = [_significant(part) for part in (*loss, sum(loss))]
    head = ["of a positive", "of its negatives", "sum"]
    return markdown(DataFrame.from_dict(rows, orient="index", columns=head).rename_axis("prior"))


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def provenance(study: Study) -> str:
    """Table of where the rows come from: one line per grid, machine and set of versions."""
    names = ["grid", "cpu", "cpu_threads", "gpu", "system", "python", "versions"]
    origins = study.runs.groupby([study.runs[name].map(shown) for name in names], sort=False)
    table = DataFrame([_origin(rows) for _, rows in origins]).set_index("grid")
    return markdown(table, left=["machine", "versions", "commits", "sources", "reduced"])


def _origin(rows: DataFrame) -> Run:
    first = rows.iloc[0]
    machine = [str(first[name]) for name in ("gpu", "cpu", "system") if first[name]]
    if first.cpu_threads:
        machine.append(f"CPU threads per run: {first.cpu_threads}")
    versions = {"Python": first.python, **(first.versions or {})}
    return {
        "grid": shown(first.grid),
        "rows": len(rows),
        "machine": _listed(machine),
        "versions": _listed(f"{name} {version}" for name, version in versions.items() if version),
        "commits": _listed(rows.commit.map(shown).unique()),
        "sources": _listed(rows.source.map(shown).unique()),
        "reduced": "no" if first.gpu else "yes: trained without a GPU",
    }


def failures(study: Study) -> str:
    """Table of the runs that ended in an error and did not succeed on another line."""
    rows = [
        {
            "run": f"{run['section']}: {run['method']}",
            "setting": f"{run['data']}, {run['detector']}, {run['steps']:,} steps",
            "seed": run["seed"],
            "error": " ".join(str(run["error"]).split())[:200],
        }
        for run in study.failures
    ]
    return markdown(DataFrame(rows).set_index("run"), left=["setting", "error"])


def _per_setting(frame: DataFrame, draw: Callable[[DataFrame], str]) -> str:
    tables = []
    for section, title, part in by_setting(frame):
        outline = part.frame.iloc[0]
        note = f" ({outline})" if outline and outline not in title else ""
        tables.append(f"**{section}: {title}**{note}\n\n{draw(part)}")
    return "\n\n".join(tables)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
