"""Find the grid for each pass on a GPU: programs per multiprocessor.

    python -m benchmarks.tune                      # appends to benchmarks/results/tune.jsonl

The library launches `PROGRAMS_EACH` of `ghm_triton/ops/launch.py` on every device; this benchmark
chooses that number. One JSON line per pass, dtype, kind of target and number of programs, with the
bandwidth on the minimum traffic and its share of that of a copy in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loss_cases import DTYPES
from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows
from benchmarks.timing import Work, copy_rate, race
from ghm_triton.ops import bce, launch

RESULTS = Path(__file__).parent / "results" / "tune.jsonl"
PROGRAMS = (2, 3, 4, 5, 6, 7, 8)
ROWS, CLASSES, BINS = 2**20, 80, 30


def passes(logits: Tensor, target: Tensor) -> Iterator[tuple[str, float, Work]]:
    """Yield name, bytes and launch of the two passes of a training step."""
    read = logits.nbytes + target.nbytes
    table = torch.ones(BINS, device=logits.device)
    scale = torch.ones((), device=logits.device)
    yield "count", read, partial(bce.launch_count, logits, target, None, BINS)
    loss = partial(bce.WEIGHTED_BCE.forward, logits, target, None, table, scale, False, True, True)
    yield "loss and gradient", read + logits.nbytes, loss


def measure(rows: int, dtype: str, kind: str, device: str, seconds: float) -> Iterator[Row]:
    """Yield the rows of one problem: every pass with every number of programs, in turns."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(rows, CLASSES, device=device, generator=generator) * 2 - 4
    target = torch.randint(0, CLASSES + 1, (rows,), device=device, generator=generator)
    if kind == "dense":
        target = torch.rand(rows, CLASSES, device=device, generator=generator)
    roof = copy_rate(device, seconds)
    for name, moved, work in passes(logits.to(DTYPES[dtype]), target):
        contenders = {each: partial(_with_programs, each, work) for each in PROGRAMS}
        timings, errors = race(contenders, device, seconds, rounds=5)
        for each in PROGRAMS:
            row: Row = {"pass": name, "dtype": dtype, "target": kind, "programs": each}
            row["entries"] = rows * CLASSES
            if each in errors:
                yield row | {"error": str(errors[each])}
                continue
            took = timings[each].median
            rate = moved / took / 1e6
            yield row | {"median_ms": took, "gigabytes_s": rate, "share_of_copy": rate / roof}


def _with_programs(each: int, work: Work) -> None:
    before = launch.PROGRAMS_EACH
    launch.PROGRAMS_EACH = each
    try:
        work()
    finally:
        launch.PROGRAMS_EACH = before


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda", help="cpu: interpreted, as a smoke test")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seconds", type=float, default=0.15, help="spent on each number")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON lines; appended to")
    options = parser.parse_args()
    results = Rows(options.out, {"device": options.device, **provenance()})
    for dtype in ("float32", "bfloat16"):
        for kind in ("index", "dense"):
            for row in measure(options.rows, dtype, kind, options.device, options.seconds):
                results.add(row)
                share = f"{row['share_of_copy']:.1%}" if "share_of_copy" in row else row["error"]
                print(f"{row['pass']:<18} {dtype:<9} {kind:<6} {row['programs']:>3} {share}")


if __name__ == "__main__":
    main()
