"""A study's tables: methods, classes, threshold policies, the loss at the start, provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.study.report import markdown
from benchmarks.study.report.runs import (
    Group,
    Run,
    Setting,
    Study,
    Summary,
    Value,
    baseline_of,
    by_setting,
    paired,
    shown,
    summarise,
    titles,
)

AVERAGES = (("AP", "ap"), ("AP50", "ap50"), ("AP75", "ap75"))
SINGLE, F1 = "single", "f1"  # policies: the best one threshold for all classes, and one a class
# Anchors a positive and classes of METHODS' table: about RetinaNet's on COCO.
ANCHORS, CLASSES = 1000, 80
PRIORS = (0.5, 1e-2, 1e-5, 1e-10)


def methods(groups: Sequence[Group], baseline: str, peers: Sequence[Group] = ()) -> str:
    """For every setting: AP by method over seeds, against the baseline, and the time a step.

    Args:
        groups: What is shown of a study.
        baseline: The method that the others are compared with, paired by seed.
        peers: Where the baseline is looked for; empty for `groups`.
    """
    return _by_setting(groups, lambda own: _methods(own, peers or groups, baseline))


def _methods(own: Sequence[Group], groups: Sequence[Group], baseline: str) -> str:
    rows = [[_marked(group), ", ".join(map(str, group.seeds))] for group in own]
    for _, name in AVERAGES:
        summaries = [group.summary(field(name)) for group in own]
        cells = [markdown.spread(summary) for summary in summaries]
        _append(rows, markdown.bold_best(cells, summaries))
    notes = _mixtures(own)
    _append(rows, [_against(group, groups, baseline, notes) for group in own])
    _append(rows, [markdown.spread(group.summary(field("step_ms")), 1) for group in own])
    sharing = sorted({run.get("parallel") or 1 for group in own for run in group.runs})
    if sharing != [1]:
        notes.append(f"Runs that shared the machine while steps were timed: {_listed(sharing)}.")
    names = [name for name, _ in AVERAGES]
    head = ("method", "seeds", *names, f"AP against {baseline}", "ms a step")
    return "\n\n".join([markdown.table(head, rows, left=(0, 1)), *dict.fromkeys(notes)])


def _against(group: Group, groups: Sequence[Group], name: str, notes: list[str]) -> str:
    if group.method == name:
        return "baseline"
    baseline = baseline_of(group, groups, name)
    if baseline is None:
        notes.append(f"There is no row of {name} to compare with.")
        return markdown.NOTHING
    if baseline.setting.section != group.setting.section:
        notes.append(f"{name} is that of section {baseline.setting.section}.")
    return markdown.difference(paired(group, baseline, field("ap")), len(group.seeds))


def _marked(group: Group) -> str:
    return f"{group.method} †" if group.disagreements() else group.method


def _mixtures(own: Sequence[Group]) -> list[str]:
    """Footnotes on what a table's rows do not have in common."""
    notes = []
    for group in own:
        for name, seeds in group.disagreements().items():
            parts = "; ".join(f"{value} ({_seeds(of)})" for value, of in seeds.items())
            notes.append(f"† {group.method}: seeds differ in {name}: {parts}.")
    for name in ("cpu", "gpu", "source", "commit", "versions"):
        values = list(dict.fromkeys(shown(run.get(name)) for group in own for run in group.runs))
        if len(values) > 1:
            notes.append(f"Rows of this table differ in {name}: {', '.join(values)}.")
    return notes


def _seeds(seeds: Sequence[int]) -> str:
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {_listed(seeds)}"


def classes(groups: Sequence[Group]) -> str:
    """For every setting: AP and AP50 of every class by method, means over seeds."""
    return _by_setting(groups, _classes)


def _classes(own: Sequence[Group]) -> str:
    names = list(
        dict.fromkeys(name for group in own for run in group.runs for name in _per_class(run))
    )
    if not names:
        return "No row tells the classes apart."
    tables = []
    for place, title in enumerate(("AP", "AP50")):
        rows = [[group.method] for group in own]
        for name in names:
            summaries = [group.summary(of_class(name, place)) for group in own]
            cells = [markdown.spread(_plain(summary)) for summary in summaries]
            _append(rows, markdown.bold_best(cells, summaries))
        tables.append(markdown.table((f"{title} of class", *names), rows))
    return "\n\n".join(tables)


def policies(groups: Sequence[Group]) -> str:
    """For every setting: macro-F1 of every threshold policy by method, means over seeds.

    The last column is what a threshold a class is worth: policy f1 minus the best single threshold,
    paired by seed, with its range.
    """
    return _by_setting(groups, _policies)


def _policies(own: Sequence[Group]) -> str:
    names = policy_names(own)
    if not names:
        return "No row tells of threshold policies."
    rows = [[group.method] for group in own]
    for name in names:
        summaries = [group.summary(macro_f1(name)) for group in own]
        _append(rows, [markdown.spread(_plain(summary)) for summary in summaries])
    _append(rows, [_gain(group) for group in own])
    return markdown.table(("macro-F1 of method", *names, f"{F1} minus {SINGLE}"), rows)


def _gain(group: Group) -> str:
    ours, theirs = group.values(macro_f1(F1)), group.values(macro_f1(SINGLE))
    gains = summarise(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())
    return markdown.difference(gains, len(group.seeds))


def policy_names(groups: Iterable[Group]) -> list[str]:
    """Threshold policies of any row: `single` first, the others as the rows bring them."""
    found = {name: None for group in groups for run in group.runs for name in _policies_of(run)}
    return sorted(found, key=lambda name: name != SINGLE)


def initial_losses(anchors: int = ANCHORS, classes: int = CLASSES) -> str:
    """Cross entropy a positive before the first step, by the prior that the bias starts from.

    Section 3 of arXiv 1909.04868. Loads torch.

    Args:
        anchors: Anchors a positive one, `N / N_f`.
        classes: `C`.
    """
    from ghm_triton.imbalance.sampling_free import initial_loss, optimal_prior

    counts = {"positives": 1, "counted": anchors, "classes": classes}
    best = optimal_prior(**counts)
    rows = []
    for prior in sorted((*PRIORS, best), reverse=True):
        loss = initial_loss(prior, **counts)
        name = f"{prior:g}" + (" (optimal)" if prior == best else "")
        rows.append([name, *(_significant(part) for part in (*loss, sum(loss)))])
    return markdown.table(("prior", "of a positive", "of its negatives", "sum"), rows)


def _significant(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e4 else f"{value:.4g}"


def provenance(study: Study) -> str:
    """Where the rows come from: one line for each grid, machine and set of versions."""
    origins: dict[tuple[str, ...], list[Run]] = {}
    for run in study.runs:
        names = ("grid", "cpu", "cpu_threads", "gpu", "system", "python", "versions")
        origins.setdefault(tuple(shown(run.get(name)) for name in names), []).append(run)
    rows = [_origin(runs) for runs in origins.values()]
    head = ("grid", "rows", "machine", "versions", "commits", "sources", "reduced")
    return markdown.table(head, rows, left=(0, 2, 3, 4, 5, 6))


def _origin(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    machine = [str(first[name]) for name in ("gpu", "cpu", "system") if first.get(name)]
    if first.get("cpu_threads"):
        machine.append(f"CPU threads a run: {first['cpu_threads']}")
    versions = {"Python": first.get("python"), **(first.get("versions") or {})}
    return [
        shown(first.get("grid")),
        str(len(runs)),
        ", ".join(machine),
        ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        _listed(dict.fromkeys(shown(run.get("commit")) for run in runs)),
        _listed(dict.fromkeys(shown(run.get("source")) for run in runs)),
        "no" if first.get("gpu") else "yes: trained without a GPU",
    ]


def failures(study: Study) -> str:
    """Runs that ended in an error and did not succeed on another line."""
    rows = [
        [
            f"{run['section']}: {run['method']}",
            f"{run['data']}, {run['detector']}, {run['steps']:,} steps",
            str(run["seed"]),
            " ".join(str(run["error"]).split())[:200],
        ]
        for run in study.failures
    ]
    return markdown.table(("run", "setting", "seed", "error"), rows, left=(0, 1, 3))


def field(name: str) -> Value:
    """A number that lies in a row itself."""
    return lambda run: run.get(name)


def of_class(name: str, place: int) -> Value:
    """AP (place 0) or AP50 (1) of a class."""

    def value(run: Run) -> Any:
        pair = _per_class(run).get(name)
        return pair[place] if isinstance(pair, list) and len(pair) > place else None

    return value


def macro_f1(policy: str) -> Value:
    """Macro-F1 on the test split at the thresholds of a policy."""

    def value(run: Run) -> Any:
        return (_policies_of(run).get(policy) or {}).get("macro_f1")

    return value


def _per_class(run: Run) -> dict[str, Any]:
    return run.get("ap_per_class") or {}


def _policies_of(run: Run) -> dict[str, Any]:
    return run.get("policies") or {}


def _by_setting(groups: Sequence[Group], draw: Callable[[Sequence[Group]], str]) -> str:
    settings = by_setting(groups)
    names = titles(settings)
    return "\n\n".join(
        f"{_heading(setting, names[setting])}\n\n{draw(own)}" for setting, own in settings.items()
    )


def _heading(setting: Setting, title: str) -> str:
    frame = f" ({setting.frame})" if setting.frame and setting.frame not in title else ""
    return f"**{setting.section}: {title}**{frame}"


def _append(rows: list[list[str]], cells: Iterable[str]) -> None:
    for row, cell in zip(rows, cells, strict=True):
        row.append(cell)


def _plain(summary: Summary | None) -> Summary | None:
    """Without the deviation, where a table shows means."""
    return None if summary is None else summary._replace(std=None)


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
