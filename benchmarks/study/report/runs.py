"""The rows of a study's result files, as one data frame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame, Series

Run = dict[str, Any]

# Required fields of every line, whether its run succeeded or not, and their types.
KEY = {"section": str, "data": str, "detector": str, "method": str, "seed": int, "steps": int}
# Rows are averaged over seeds, and methods compared, only where all of these are equal. Rows of two
# sections may be compared where all but the section are (PEERS).
PEERS = ["data", "detector", "steps", "batch_size", "image_size", "channels"]
SETTING = ["section", *PEERS]
# Fields that the runs of one method should share; footnotes list those that differ.
ORIGIN = ("grid", "cpu", "gpu", "source", "commit", "versions", "options", "config", "recipe")
NUMBERS = ["ap", "ap50", "ap75", "step_ms", "strength", "bins"]
OBJECTS = ["options", "config", "ap_per_class", "policies", "curves", "gradient_norms"]
OTHERS = ["python", "cpu_threads", "system", "parallel", "label", "frame", "title"]
COLUMNS = list(dict.fromkeys([*SETTING, "method", "seed", *NUMBERS, *OBJECTS, *ORIGIN, *OTHERS]))

# Losses with curves; UNGUIDED is the classification loss before the guide scales it.
CLASSIFICATION, REGRESSION = "classification", "bbox_regression"
UNGUIDED = "unguided_classification"
SAME_RATIO = 1e-4  # relative: rows store losses to six digits


class RunFileError(ValueError):
    """A line of a result file is damaged or is not a row of a study."""


@dataclass
class Study:
    """Contents of result files.

    Attributes:
        everything: One row per section, setting, method and seed. Settings of one section, and
            methods of one setting, are adjacent, the baseline first. Beside the fields of the file:
            `label` (data, detector, steps), `frame` (batch, image and width) and `title`, which is
            the label, with the frame where the label is ambiguous within its section.
        runs: The rows of the selected sections.
        failures: Lines with an error whose run did not succeed on another line.
        unfinished: Files whose incomplete last line was dropped.
        replaced: Number of rows that a later line replaces.
    """

    everything: DataFrame
    runs: DataFrame
    failures: list[Run] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    replaced: int = 0


def read_study(paths: Sequence[Path], sections: Sequence[str] = (), first: str = "focal") -> Study:
    """Read result files.

    Args:
        paths: JSON lines, as `python -m benchmarks.study` writes them.
        sections: Sections to show; empty for all.
        first: The method that precedes the others of its setting.

    Raises:
        RunFileError: A line is damaged or is not a row of a study (names file and line), or there
            is no row of a selected section.
        OSError: A file cannot be read.
    """
    runs: dict[str, Run] = {}
    failures: dict[str, Run] = {}
    unfinished: list[str] = []
    seen: dict[str, None] = {}
    replaced = 0
    for path in paths:
        for run in _lines(path, unfinished):
            seen[run["section"]] = None
            key = json.dumps([run.get(name) for name in (*SETTING, "method", "seed")])
            chosen = not sections or run["section"] in sections
            if run.get("error") is not None:
                failures |= {key: run} if chosen else {}
                continue
            replaced += key in runs and chosen
            runs[key] = run
    for section in sections:
        if section not in seen:
            raise RunFileError(f"no row is of section {section!r}; sections: {', '.join(seen)}")
    everything = _frame(runs.values(), first)
    shown = everything[everything.section.isin(sections or list(seen))]
    failed = [run for key, run in failures.items() if key not in runs]
    return Study(everything, shown, failed, unfinished, replaced)


def _lines(path: Path, unfinished: list[str]) -> Iterator[Run]:
    try:
        finished, newline, rest = path.read_text().rpartition("\n")
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path} is not a text file: {error}") from None
    if rest.strip():
        unfinished.append(str(path))
    for number, line in enumerate((finished + newline).split("\n"), start=1):
        if line.strip():
            yield _parsed(line, f"{path}, line {number}")


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


def _frame(runs: Iterable[Run], first: str) -> DataFrame:
    rows = [_row(run) for run in runs]
    frame = DataFrame(rows, columns=[*COLUMNS, "training"], dtype=object)
    numbers = frame[NUMBERS].apply(pd.to_numeric, errors="coerce").astype(float)
    frame[NUMBERS] = numbers.where(np.isfinite(numbers))
    # Runs end in any order where several share a machine: bring together what belongs together.
    order = DataFrame(
        {
            "section": _rank(frame, ["section"]),
            "setting": _rank(frame, SETTING),
            "baseline": frame.method != first,
            "method": _rank(frame, [*SETTING, "method"]),
            "seed": frame.seed.astype(int),
        }
    )
    frame = frame.loc[order.sort_values(list(order), kind="stable").index].reset_index(drop=True)
    frames = frame.groupby(["section", "label"], sort=False).frame.transform("nunique")
    frame["title"] = frame.label.where(frames.eq(1), frame.label + ", " + frame.frame)
    return frame


def _row(run: Run) -> Run:
    size = run.get("image_size")
    sides = "x".join(map(str, size)) if isinstance(size, list) else None
    batch, channels = run.get("batch_size"), run.get("channels")
    frame = [
        f"batch {batch}" if batch is not None else "",
        f"{sides} pixels" if sides else "",
        f"{channels} channels" if channels is not None else "",
    ]
    return {
        **{name: run.get(name) for name in COLUMNS},
        **{name: run.get(name) or {} for name in OBJECTS},
        "image_size": sides,
        "label": f"{run['data']}, {run['detector']}, {run['steps']:,} steps",
        "frame": ", ".join(filter(None, frame)),
        # A study repeats the row of one training under every section and method that uses it.
        "training": shown({k: v for k, v in run.items() if k not in ("section", "method")}),
    }


def _rank(frame: DataFrame, names: list[str]) -> Series:
    """Rank of every row by the first appearance of its values."""
    return frame.groupby(names, sort=False, dropna=False).ngroup()


def by_setting(frame: DataFrame) -> Iterator[tuple[str, str, DataFrame]]:
    """Yield section, title and rows of every setting."""
    for (section, title), part in frame.groupby(["section", "title"], sort=False):
        yield section, title, part


def by_method(frame: DataFrame) -> Iterator[tuple[str, DataFrame]]:
    """Yield name and rows of every method."""
    yield from frame.groupby("method", sort=False)


def baseline_of(part: DataFrame, everything: DataFrame, name: str) -> DataFrame:
    """Rows of the baseline for a setting: of its own section, else of the first other one.

    Args:
        part: Rows of one setting.
        everything: All rows of the study.
        name: The baseline's method.

    Returns:
        Empty where no section has the baseline in this setting.
    """
    rows = peers_of(part, everything)
    rows = rows[rows.method == name]
    own = rows[rows.section == part.section.iloc[0]]
    return own if len(own) else rows[rows.section == rows.section.iloc[0]] if len(rows) else rows


def peers_of(part: DataFrame, everything: DataFrame) -> DataFrame:
    """Rows of any section that agree with a setting's rows in everything but the section."""
    values = part[PEERS].iloc[0]
    equal = (everything[PEERS] == values) | (everything[PEERS].isna() & values.isna())
    return everything[equal.all(axis=1)]


def is_guided(curves: Run) -> bool:
    """Whether a guide scaled the classification loss to the box loss.

    Rows recorded before UNGUIDED existed are recognised by a constant ratio of the two losses.
    """
    if UNGUIDED in curves:
        return True
    losses = DataFrame(
        zip(curves.get(CLASSIFICATION, ()), curves.get(REGRESSION, ()), strict=False), dtype=float
    )
    if losses.empty:
        return False
    ratios = (losses[0] / losses[1])[(losses != 0).all(axis=1)].dropna()
    return len(ratios) > 1 and bool(ratios.max() - ratios.min() < SAME_RATIO * ratios.max())


def shown(value: Any) -> str:
    """A field of a row as text; equal for equal values."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
