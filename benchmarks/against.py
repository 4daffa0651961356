"""Time the losses of two checkouts in turns, on the CPU.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before --seconds 300

One process per checkout, with its `ghm_triton` on the path, times the same inputs. In every round
each loss is timed in both, in changing order; `ratio` is the median over rounds of this checkout's
time by the other's: 1.05 is 5 % slower. One JSON line per loss, with provenance.

`python -m benchmarks.serving --before ../before` does the same for the service.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.provenance import ROOT, provenance, source_digest
from benchmarks.result_file import Row, Rows

RESULTS = Path(__file__).parent / "results" / "against.jsonl"
WORKER = Path(__file__).parent / "against_worker.py"
CALLS_MS = 100.0  # time per turn, about


class Checkout:
    """The worker process of a checkout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.losses = self._answer().split("\t")

    def time(self, loss: str, calls: int) -> float:
        """Median milliseconds of a loss and its gradient over several calls."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe
        self._process.stdin.write(f"{loss}\t{calls}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - a pipe
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}")
        return line.rstrip("\n")


@contextmanager
def started(path: Path, threads: int) -> Iterator[Checkout]:
    """Start the worker of a checkout."""
    if not (path / "ghm_triton" / "__init__.py").is_file():
        raise FileNotFoundError(f"{path} is no checkout: it has no ghm_triton/__init__.py")
    command = [sys.executable, str(WORKER), str(threads)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(path.resolve())}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            yield Checkout(process)
        finally:
            process.kill()


def compare(before: Path, after: Path, threads: int, rounds: int, seconds: float) -> list[Row]:
    """Time every loss in both checkouts until the rounds are done or the time is up."""
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(started(path, threads))
            for name, path in (("before", before), ("after", after))
        }
        losses = sides["after"].losses
        calls = {loss: max(1, round(CALLS_MS / sides["after"].time(loss, 3))) for loss in losses}
        times: dict[str, dict[str, list[float]]] = {n: {s: [] for s in sides} for n in losses}
        end = time.monotonic() + seconds
        for number in range(rounds):
            if time.monotonic() > end:
                break
            for loss in losses:
                for side in sorted(sides, reverse=bool(number % 2)):
                    times[loss][side].append(sides[side].time(loss, calls[loss]))
    return [{"loss": loss, "threads": threads, **summary(times[loss])} for loss in losses]


def summary(times: dict[str, list[float]]) -> Row:
    """Medians of both sides and of their ratio per round, with the ratio's quartiles."""
    ratios = [new / old for new, old in zip(times["after"], times["before"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = {f"{side}_ms": round(statistics.median(each), 4) for side, each in times.items()}
    figures = {"ratio": middle, "ratio_low": low, "ratio_high": high}
    return {**medians, **{k: round(v, 4) for k, v in figures.items()}, "rounds": len(ratios)}


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--after", type=Path, default=ROOT, help="default: this checkout")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=300, help="begin no round after these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; appended to")
    options = parser.parse_args(words)
    origin = {"before": source_digest(options.before / "ghm_triton"), **provenance()}
    rows = Rows(options.out, origin)
    paths = options.before, options.after
    for row in compare(*paths, options.threads, options.rounds, options.seconds):
        rows.add(row)
        spread = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        times = f"{row['before_ms']:9.3f} ms  {row['after_ms']:9.3f} ms"
        print(f"{row['loss']:<36}{times}  {row['ratio']:.3f} ({spread})", flush=True)


if __name__ == "__main__":
    main()
