"""`ghm report`: a study's result files as tables and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ghm_triton.command import Command


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm report`."""
    parser.description = """\
Turn the result files of a study (python -m benchmarks.study) into OUT/report.md: AP over seeds by
method and by class, differences to a baseline, threshold policies, and figures beside it.

examples:
  ghm report benchmarks/results/study_cpu.jsonl --out runs/report
  ghm report cpu.jsonl gpu.jsonl --out runs/report --baseline ce --section methods"""
    add = parser.add_argument
    add("files", type=Path, nargs="+", metavar="FILE", help="JSON lines, one a run")
    add("--out", type=Path, required=True, help="folder for report.md and its pictures")
    add("--baseline", default="focal", help="method to compare with (default: focal)")
    add(
        "--section",
        action="append",
        default=[],
        help="show only this section of the grid; may be given again (default: all)",
    )
    add("--tensorboard", type=Path, metavar="DIR", help="also write loss curves as event files")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `ghm report`."""
    from ghm_triton.report import tables
    from ghm_triton.report.document import write_report
    from ghm_triton.report.runs import read_study

    study = read_study(arguments.files, arguments.section)
    written = write_report(study, arguments.out, arguments.baseline)
    first = arguments.baseline
    print(tables.methods(study.groups(first), first, study.peers(first)))
    print(f"\nreport: {written[0]}, with {len(written) - 1} figures")
    if arguments.tensorboard:
        from ghm_triton.report.events import write_events

        count = write_events(study, arguments.tensorboard)
        print(f"event files: {arguments.tensorboard}, curves of {count} runs")
    for path in study.unfinished:
        print(f"ghm: the unfinished last line of {path} was dropped", file=sys.stderr)
    if study.failures:
        print(f"ghm: {len(study.failures)} runs failed; the report lists them", file=sys.stderr)
    return 0


REPORT = Command("report", "tables and figures of a study's results", configure, run, "train")
