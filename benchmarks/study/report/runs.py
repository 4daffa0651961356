"""The rows of a study's result files, grouped over their seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Run = dict[str, Any]

# What every line has, whether its run ended well or not, and of which type.
KEY = {"section": str, "data": str, "detector": str, "method": str, "seed": int, "steps": int}
# Where rows of one method should agree, or a reader has to be told.
ORIGIN = ("grid", "cpu", "gpu", "source", "commit", "versions", "options", "config", "recipe")

# Losses that have curves; how the first was before a guide scaled it to the second.
CLASSIFICATION, REGRESSION = "classification", "bbox_regression"
UNGUIDED = "unguided_classification"
SAME_RATIO = 1e-4  # rows have losses to six digits


class RunFileError(ValueError):
    """A line of a result file that is no row of a study."""


class Setting(NamedTuple):
    """What rows have in common that may be compared with one another.

    Attributes:
        section: Of the grid.
        data: The data set.
        detector: The architecture.
        steps: Optimiser steps.
        batch_size: Images a step; None where the row does not tell, as below.
        image_size: Height and width in pixels.
        channels: Width of the detector.
    """

    section: str
    data: str
    detector: str
    steps: int
    batch_size: int | None = None
    image_size: tuple[int, ...] | None = None
    channels: int | None = None

    @property
    def label(self) -> str:
        """Data set, detector and steps, for a title."""
        return f"{self.data}, {self.detector}, {self.steps:,} steps"

    @property
    def frame(self) -> str:
        """Batch, image and width, for what the label leaves open."""
        known = []
        if self.batch_size is not None:
            known.append(f"batch {self.batch_size}")
        if self.image_size is not None:
            known.append(f"{'x'.join(map(str, self.image_size))} pixels")
        if self.channels is not None:
            known.append(f"{self.channels} channels")
        return ", ".join(known)

    @property
    def peers(self) -> tuple[Any, ...]:
        """Everything but the section: rows of two sections compare where this is equal."""
        return tuple(self[1:])


class Summary(NamedTuple):
    """A number over seeds; `std` is the sample's (divided by n - 1), None for a single seed."""

    mean: float
    std: float | None
    low: float
    high: float
    seeds: int


@dataclass(frozen=True)
class Group:
    """The runs of one method in one setting, one a seed, by seed."""

    setting: Setting
    method: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds in rising order."""
        return tuple(run["seed"] for run in self.runs)

    def values(self, value: Value) -> dict[int, float]:
        """A number by seed, where a row has it."""
        found = {run["seed"]: number(value(run)) for run in self.runs}
        return {seed: each for seed, each in found.items() if each is not None}

    def summary(self, value: Value) -> Summary | None:
        """A number over seeds; None where no row has it."""
        return summarise(self.values(value).values())

    def disagreements(self) -> dict[str, dict[str, list[int]]]:
        """Fields of `ORIGIN` in which the seeds differ: the seeds of every value."""
        found: dict[str, dict[str, list[int]]] = {}
        for name in ORIGIN:
            seeds: dict[str, list[int]] = {}
            for run in self.runs:
                seeds.setdefault(shown(run.get(name)), []).append(run["seed"])
            if len(seeds) > 1:
                found[name] = seeds
        return found


Value = Callable[[Run], Any]


@dataclass
class Study:
    """What result files hold.

    Attributes:
        runs: One a section, setting, method and seed, of the sections that are shown.
        everything: Of all sections: what is shown may be compared with what is not.
        failures: Lines with an error whose run did not succeed on another line.
        unfinished: Files whose last line a killed run left unfinished; it was dropped.
        replaced: How many rows were measured again on a later line, which counts.
    """

    runs: list[Run] = field(default_factory=list)
    failures: list[Run] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    replaced: int = 0
    everything: list[Run] = field(default_factory=list)

    def groups(self, first: str = "") -> list[Group]:
        """What is shown, by section, setting and method, in the order in which the files bring it.

        Args:
            first: A method that comes before the others of its setting.
        """
        return _grouped(self.runs, first)

    def peers(self, first: str = "") -> list[Group]:
        """What may be compared with: the groups of all sections, shown or not."""
        return _grouped(self.everything, first)


def _grouped(runs: Iterable[Run], first: str) -> list[Group]:
    gathered: dict[tuple[Setting, str], list[Run]] = {}
    for run in runs:
        gathered.setdefault((setting_of(run), run["method"]), []).append(run)
    groups = [
        Group(setting, method, tuple(sorted(runs, key=lambda run: run["seed"])))
        for (setting, method), runs in gathered.items()
    ]
    # Runs end in any order where several share a machine: keep together what belongs together.
    sections = list(dict.fromkeys(group.setting.section for group in groups))
    settings = list(dict.fromkeys(group.setting for group in groups))
    return sorted(
        groups,
        key=lambda group: (
            sections.index(group.setting.section),
            settings.index(group.setting),
            group.method != first,
        ),
    )


def read_study(paths: Sequence[Path], sections: Sequence[str] = ()) -> Study:
    """Read result files.

    Args:
        paths: JSON lines, as `python -m benchmarks.study` writes them.
        sections: Only these are shown; empty for all.

    Raises:
        RunFileError: A line is damaged or is no row of a study; names the file and the line. Or
            a section is asked for that no row is of.
        OSError: A file cannot be read.
    """
    study = Study()
    runs: dict[tuple[Any, ...], Run] = {}
    failures: dict[tuple[Any, ...], Run] = {}
    seen: dict[str, None] = {}
    for path in paths:
        for run in _lines(path, study):
            seen[run["section"]] = None
            key = (setting_of(run), run["method"], run["seed"])
            if run.get("error") is not None:
                failures[key] = run
                continue
            study.replaced += key in runs and _chosen(run, sections)
            runs[key] = run
    for section in sections:
        if section not in seen:
            raise RunFileError(f"no row is of section {section!r}; sections: {', '.join(seen)}")
    failed = [run for key, run in failures.items() if key not in runs]
    study.everything = list(runs.values())
    study.runs = [run for run in study.everything if _chosen(run, sections)]
    study.failures = [run for run in failed if _chosen(run, sections)]
    return study


def _chosen(run: Run, sections: Sequence[str]) -> bool:
    return not sections or run["section"] in sections


def _lines(path: Path, study: Study) -> Iterable[Run]:
    try:
        finished, newline, rest = path.read_text().rpartition("\n")
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path} is not a text file: {error}") from None
    if rest.strip():
        study.unfinished.append(str(path))
    for place, line in enumerate((finished + newline).split("\n"), start=1):
        if line.strip():
            yield _parsed(line, f"{path}, line {place}")


def _parsed(line: str, where: str) -> Run:
    try:
        run = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RunFileError(f"{where} is damaged: {error}") from None
    if not isinstance(run, dict):
        raise RunFileError(f"{where} is no row of a study: {line[:60]!r} is not an object")
    for name, kind in KEY.items():
        if not isinstance(run.get(name), kind) or isinstance(run[name], bool):
            raise RunFileError(
                f"{where} is no row of a study: {name!r} is {run.get(name)!r},"
                f" expected {kind.__name__}"
            )
    if run.get("error") is None and "ap" not in run:
        raise RunFileError(f"{where} is no row of a study: it has neither 'ap' nor 'error'")
    return run


def setting_of(run: Run) -> Setting:
    """What a run may be compared within."""
    size = run.get("image_size")
    sides = tuple(side for side in size if isinstance(side, int)) if isinstance(size, list) else ()
    return Setting(
        run["section"],
        run["data"],
        run["detector"],
        run["steps"],
        _whole(run.get("batch_size")),
        sides or None,
        _whole(run.get("channels")),
    )


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def number(value: Any) -> float | None:
    """A finite number, or None for anything else: rows write NaN as null."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def guided(run: Run) -> bool:
    """Whether a guide scaled the classification to the boxes, so that its curve is theirs again.

    Told by the curve of how it was before; rows recorded earlier lack it, but in them the two
    losses have the same ratio at all points.
    """
    curves = run.get("curves") or {}
    if UNGUIDED in curves:
        return True
    pairs = zip(curves.get(CLASSIFICATION) or (), curves.get(REGRESSION) or (), strict=False)
    ratios = [mine / boxes for mine, boxes in pairs if number(mine) and number(boxes)]
    return len(ratios) > 1 and max(ratios) - min(ratios) < SAME_RATIO * max(ratios)


def trainings(runs: Iterable[Run]) -> int:
    """How many trainings runs are of: a study writes one down at every place that wants it."""
    places = ("section", "method")
    return len({shown({k: v for k, v in run.items() if k not in places}) for run in runs})


def summarise(values: Iterable[float]) -> Summary | None:
    """Mean, sample standard deviation and range; None of nothing."""
    each = list(values)
    if not each:
        return None
    deviation = statistics.stdev(each) if len(each) > 1 else None
    return Summary(statistics.fmean(each), deviation, min(each), max(each), len(each))


def paired(group: Group, baseline: Group, value: Value) -> Summary | None:
    """`group` minus `baseline`, seed by seed; None where they share no seed."""
    ours, theirs = group.values(value), baseline.values(value)
    return summarise(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())


def by_setting(groups: Iterable[Group]) -> dict[Setting, list[Group]]:
    """Groups of the same setting together, in order."""
    found: dict[Setting, list[Group]] = {}
    for group in groups:
        found.setdefault(group.setting, []).append(group)
    return found


def baseline_of(group: Group, groups: Iterable[Group], name: str) -> Group | None:
    """The baseline that a group is compared with: its own section's, else another section's."""
    candidates = [
        other
        for other in groups
        if other.method == name and other.setting.peers == group.setting.peers
    ]
    own = [other for other in candidates if other.setting.section == group.setting.section]
    return next(iter(own + candidates), None)


def titles(settings: Iterable[Setting]) -> dict[Setting, str]:
    """A title for every setting, with the frame where data, detector and steps do not tell."""
    settings = list(dict.fromkeys(settings))
    labels = [(setting.section, setting.label) for setting in settings]
    return {
        setting: f"{label[1]}, {setting.frame}" if labels.count(label) > 1 else label[1]
        for setting, label in zip(settings, labels, strict=True)
    }


def shown(value: Any) -> str:
    """A value of a row as text that is equal where values are."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
