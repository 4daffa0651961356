r"""Train and measure the runs of a grid.

One JSON line per run, with provenance. Recorded runs are not repeated, failed ones are tried again,
and a training that several sections share is done once.

    python -m benchmarks.study benchmarks/study/grids/cpu.yaml
    python -m benchmarks.study benchmarks/study/grids/gpu.yaml --seconds 440 --only methods bins
    python -m benchmarks.study benchmarks/study/grids/cpu.yaml --list
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, read
from benchmarks.study.grid import Grid, GridError, distinct
from benchmarks.study.ledger import BusyError, Ledger, lookup
from benchmarks.study.plan import Run
from benchmarks.study.pool import Failure, work_off
from benchmarks.study.run import measure

RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"


def main(words: Sequence[str] | None = None, work: Callable[[Run], Row] = measure) -> int:
    """Run the command.

    Returns:
        0; 1 if a run failed, or nothing was trained because no run fits into the time; 2 if
        nothing could be started.
    """
    arguments = parser().parse_args(words)
    try:
        runs = Grid(arguments.grid).runs(arguments.only)
        if arguments.list:
            print_list(runs, read(arguments.out))
            return 0
        ledger = Ledger(arguments.out, provenance(), again=arguments.again)
        with ledger, _interrupted_by(signal.SIGTERM):
            return Study(runs, ledger, arguments.jobs, arguments.seconds).go(work)
    except (GridError, BusyError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the next call goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=lines[0])
    parser.add_argument("grid", type=Path, help="a YAML file; see benchmarks/study/grid.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (%(default)s)")
    parser.add_argument(
        "--jobs", type=_positive, help="runs side by side (default: a core each; one on a GPU)"
    )
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections of the grid")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="start no run that is expected to end later than this",
    )
    parser.add_argument("--list", action="store_true", help="print the runs and their state")
    parser.add_argument("--again", action="store_true", help="repeat recorded runs")
    return parser


class Study:
    """The trainings of some runs and their progress.

    Args:
        runs: The runs.
        ledger: The result file.
        jobs: Concurrent runs; None for the default of the machine.
        seconds: Time limit from now.
    """

    def __init__(
        self, runs: Sequence[Run], ledger: Ledger, jobs: int | None, seconds: float = float("inf")
    ) -> None:
        self.ledger, self.end = ledger, time.monotonic() + seconds
        self.waiting: list[list[Run]] = []
        for places in distinct(runs).values():
            row = ledger.found(places[0])
            if row is None:
                self.waiting.append(places)
            else:
                ledger.settle(places, row)
        self.total, self.finished, self.failed = len(self.waiting), 0, 0
        wanted = jobs or (1 if torch.cuda.is_available() else cores())
        self.jobs = max(1, min(wanted, self.total))

    def go(self, work: Callable[[Run], Row]) -> int:
        """Work off the waiting trainings. Returns 1 if one failed or none can ever fit."""
        origin = provenance()
        pending = {id(places[0]): places for places in self.waiting}
        print(f"{self.total} to train, {self.jobs} at a time", flush=True)
        threads = max(1, cores() // self.jobs)
        room = self.end - time.monotonic()
        with closing(work_off(work, self._following, self.jobs, threads)) as results:
            for run, result in results:
                places = pending[id(run)]
                self.finished += 1
                if isinstance(result, Failure):
                    self.failed += 1
                    self.ledger.fail(places, result.reason, origin)
                    self._say(run, f"FAILED: {result.reason}")
                else:
                    self.ledger.settle(places, {**result, "parallel": self.jobs})
                    self._say(run, f"AP {_number(result.get('ap'))} in {result.get('seconds')} s")
        too_long = self._tell_rest(room)
        return int(self.failed > 0 or (too_long and self.finished == 0))

    def _tell_rest(self, room: float) -> bool:
        """Print the trainings not started; return whether some would never fit.

        Args:
            room: Seconds that this call had.
        """
        waiting = [(places[0], self.ledger.estimate(places[0])) for places in self.waiting]
        too_long = [(run, seconds) for run, seconds in waiting if seconds > room]
        if len(too_long) < len(waiting):
            rest = len(waiting) - len(too_long)
            print(f"{rest} left, which do not fit into the time; call again")
        for run, seconds in too_long:
            print(f"{run} cannot fit into {room:.0f} s: it takes about {seconds:.0f} s")
        return bool(too_long)

    def _following(self) -> Run | None:
        """Return the first waiting training that fits into the remaining time."""
        left = self.end - time.monotonic()
        for places in self.waiting:
            if left > 0 and self.ledger.estimate(places[0]) <= left:
                self.waiting.remove(places)
                return places[0]
        return None

    def _say(self, run: Run, what: str) -> None:
        left = self.total - self.finished
        rest = sum(self.ledger.estimate(places[0]) for places in self.waiting) / self.jobs
        soon = f", about {rest / 60:.0f} min" if rest else ""
        print(f"[{self.finished}/{self.total}] {run}: {what}; {left} left{soon}", flush=True)


def print_list(runs: Sequence[Run], rows: Sequence[Row]) -> None:
    """Print one line per training: its state, and the sections that use it."""
    trainings = distinct(runs)
    sound = [row for row in rows if "error" not in row]
    done = 0
    for places in trainings.values():
        row, last = lookup(sound, places[0]), lookup(rows, places[0])
        state = "failed" if last and not row else "waiting"
        if row:
            done, state = done + 1, f"AP {_number(row.get('ap'))}"
        also = "".join(f"; also {run.section} · {run.method}" for run in places[1:])
        print(f"{state:<9} {places[0]}{also}")
    print(f"{done} of {len(trainings)} done")


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


@contextmanager
def _interrupted_by(kind: signal.Signals) -> Iterator[None]:
    """Handle a signal like Ctrl-C."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(kind, interrupt)
    try:
        yield
    finally:
        signal.signal(kind, before)


if __name__ == "__main__":
    sys.exit(main())
