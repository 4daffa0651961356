"""A study's result files as tables and figures.

`--out` gets report.md: AP over seeds by method and by class, differences to a baseline, threshold
policies, and the figures beside it.

    python -m benchmarks.study.report benchmarks/results/study.jsonl --out runs/report
    python -m benchmarks.study.report cpu.jsonl gpu.jsonl --out runs/report --section methods
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.report import tables
from benchmarks.study.report.document import write_report
from benchmarks.study.report.runs import read_study


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.study.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="JSON lines, one per run")
    add("--out", type=Path, required=True, help="folder for report.md and its figures")
    add("--baseline", default="focal", help="method to compare with (default: focal)")
    add(
        "--section",
        action="append",
        default=[],
        help="show only this section of the grid; repeatable (default: all)",
    )
    add("--tensorboard", type=Path, metavar="DIR", help="also write loss curves as event files")
    return parser


def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the files cannot be reported on."""
    arguments = parser().parse_args(words)
    try:
        return report(arguments)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(arguments: argparse.Namespace) -> int:
    """Write the report and print the table of methods."""
    study = read_study(arguments.files, arguments.section, arguments.baseline)
    written = write_report(study, arguments.out, arguments.baseline)
    print(tables.methods(study.runs, arguments.baseline, study.everything))
    print(f"\nreport: {written[0]}, with {len(written) - 1} figures")
    if arguments.tensorboard:
        from benchmarks.study.report.events import write_events

        count = write_events(study, arguments.tensorboard)
        print(f"event files: {arguments.tensorboard}, curves of {count} runs")
    for path in study.unfinished:
        print(f"warning: the unfinished last line of {path} was dropped", file=sys.stderr)
    if study.failures:
        print(f"warning: {len(study.failures)} runs failed; the report lists them", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
