"""Time and memory of each loss, forward and with its gradient.

    python -m benchmarks.losses                    # on the GPU, else on the CPU
    python -m benchmarks.losses --device cpu --quick

One JSON line per case, loss and stage, with provenance. The losses of a case take turns, and
`ratios` compares them turn by turn: 0.5 is half the other's time. Stages:

    forward                   the loss, ready to go backward
    forward+backward          and the gradient of the predictions
    forward+backward, scaled  the gradient of half the loss, as with a loss scale
    graph                     forward and backward replayed from a CUDA graph; small sizes only
    copy                      the predictions read once and written once
    roof                      copying what no cache holds: the bandwidth that there is

`share_of_copy` is the rate of the bytes that must move (`benchmarks.loss_cases.Case.traffic`) by
that of the better of the two copies; `peak_ratio` what forward and backward allocate, the gradient
included, by the bytes of the predictions. Cases that the file has already, of this code on this
machine, are not measured again.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import sys
import time
from pathlib import Path

import torch

from benchmarks.loss_cases import DTYPES, QUICK, Case, plan
from benchmarks.measure import ANCHORS, Settings, measure
from benchmarks.provenance import provenance
from benchmarks.result_file import BOTH, GRAPH, SCALED, Row, Rows
from benchmarks.timing import copy_rate, device_is_well

RESULTS = Path(__file__).parent / "results"
SPOILED = 75  # exit status: the device failed, and a new process can resume


def run(
    cases: list[Case], settings: Settings, rows: Rows, limit: float, *, again: bool = False
) -> None:
    """Measure the missing cases while there is time.

    Args:
        cases: The cases, the most important first.
        settings: Time and rounds.
        rows: The result file.
        limit: Seconds; a case starts only if the longest so far would fit.
        again: Whether to repeat recorded cases.
    """
    begun = time.monotonic()
    longest = roof = 0.0
    for case in cases:
        known = rows.here(case.key)
        if not again and any(row["stage"] == BOTH and "error" not in row for row in known):
            continue
        started = time.monotonic()
        if started + longest > begun + limit:
            print(f"no time left for {describe(case)} and what follows", flush=True)
            return
        if not roof:
            roof = copy_rate(case.device, settings.seconds)
            rows.add({"loss": "copy", "stage": "roof", "gb_per_s": roof})
        failed = set() if again else {row["loss"] for row in known if "error" in row}
        print(describe(case), flush=True)
        for row in measure(case, settings, roof, failed):
            print(line(row), end="", flush=True)
            rows.add(row)
            if "error" in row and not device_is_well(case.device):
                print(f"{row['loss']} spoiled the device", flush=True)
                sys.exit(SPOILED)
        if case.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        longest = max(longest, time.monotonic() - started)


def describe(case: Case) -> str:
    """Describe a case in words."""
    return f"{case.task}, {case.entries} entries, {case.dtype}, {case.target} targets"


def line(row: Row) -> str:
    """Format a row for the terminal; empty for stages that only the file keeps."""
    if "error" in row:
        return f"  {row['loss']:<32} {row['failed_in']}: {row['error'].splitlines()[0][:120]}\n"
    if row["stage"] not in (BOTH, SCALED, GRAPH):
        return ""
    name = row["loss"] + {BOTH: "", SCALED: ", scaled", GRAPH: ", graph"}[row["stage"]]
    text = f"  {name:<32} {row['median_ms']:>10.4f} ms"
    plain = [anchor for anchor in ANCHORS[1:] if anchor in row["ratios"]]
    text += "".join(f" {row['ratios'][anchor]:>8.2f} x {anchor}" for anchor in plain)
    if "share_of_copy" in row:
        text += f" {row['share_of_copy']:>7.1%} of copy"
    if row.get("peak_ratio") is not None:
        text += f" {row['peak_ratio']:>7.3f} x memory"
    return text + "\n"


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=here)
    parser.add_argument("--sizes", type=int, nargs="+", help="entries; default by device")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default by device")
    parser.add_argument("--seconds", type=float, help="on each loss and stage; default by device")
    parser.add_argument("--rounds", type=int, help="turns of each loss; default by device")
    parser.add_argument(
        "--compiler", help="of torch.compile, or none; default inductor on a GPU, none on a CPU"
    )
    parser.add_argument("--limit", type=float, default=1e9, help="seconds for everything")
    parser.add_argument("--quick", action="store_true", help="one small size, as a smoke test")
    parser.add_argument("--again", action="store_true", help="also repeat recorded cases")
    parser.add_argument("--out", type=Path, help="JSON lines; appended to")
    options = parser.parse_args()
    if options.limit < 1e9:
        faulthandler.dump_traceback_later(options.limit + 10, exit=True)  # where does it hang?
    gpu = options.device == "cuda"
    compiler = options.compiler or ("aot_eager" if options.quick else "inductor" if gpu else "none")
    settings = Settings(
        seconds=options.seconds or (0.01 if options.quick else 0.06 if gpu else 1.0),
        rounds=options.rounds or (2 if options.quick else 3 if gpu else 40),
        compiler=None if compiler == "none" else compiler,
    )
    sizes = options.sizes or ([QUICK] if options.quick else None)
    dtypes = options.dtypes or (["float32", "bfloat16"] if options.quick and not gpu else None)
    rows = Rows(
        options.out or RESULTS / f"losses_{'gpu' if gpu else 'cpu'}.jsonl",
        {"device": options.device, "compiler": compiler, **provenance()},
    )
    run(plan(options.device, sizes, dtypes), settings, rows, options.limit, again=options.again)


if __name__ == "__main__":
    main()
