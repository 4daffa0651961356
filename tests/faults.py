"""Plant faults in the source and report which of them the tests catch.

Every fault of `tests/faults.yaml` replaces one piece of text in one file. For each, the named
tests run in a copy of the tree; a fault is caught if they fail.

    python tests/faults.py                      # all faults, as a table
    python tests/faults.py --only density drift --jobs 2
    python tests/faults.py --list
    python tests/faults.py --tree OTHER_CHECKOUT --faults ITS_FAULTS.yaml --json before.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

import yaml

ROOT = Path(__file__).parents[1]
FAULTS = Path(__file__).with_suffix(".yaml")
PYTEST = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header")
FAILED = 1  # pytest's exit status where tests ran and some failed
SKIPPED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info")


@dataclass(frozen=True)
class Fault:
    """A piece of text to replace, and the tests that should notice.

    Attributes:
        name: Name of the fault, `area/what-is-wrong`.
        file: File relative to the tree.
        old: Text that occurs there exactly once.
        new: The faulty text.
        tests: Arguments of pytest: files, or `-m` and `-k` with their values.
        interpret: Whether the tests run Triton's interpreter.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    interpret: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of a fault: `caught`, `survived`, `stale` (no such text), or `error` (tests broke)."""

    name: str
    outcome: str
    seconds: float
    detail: str = ""


def read_faults(path: Path, only: Sequence[str] = ()) -> list[Fault]:
    """Read the faults of a file whose names contain any of the words in `only`."""
    entries = yaml.safe_load(path.read_text())
    faults = [Fault(**{**entry, "tests": tuple(entry["tests"].split())}) for entry in entries]
    repeated = [name for name, count in Counter(f.name for f in faults).items() if count > 1]
    if repeated:
        raise ValueError(f"{path}: names repeat: {', '.join(repeated)}")
    return [f for f in faults if not only or any(word in f.name for word in only)]


def plant(fault: Fault, tree: Path, timeout: float) -> Outcome:
    """Apply a fault to a copy of the tree, run its tests, and undo it."""
    path = tree / fault.file
    text = path.read_text() if path.exists() else ""
    found = text.count(fault.old)
    if found != 1:
        return Outcome(fault.name, "stale", 0.0, f"{fault.file} has the text {found} times")
    started = perf_counter()
    path.write_text(text.replace(fault.old, fault.new))
    try:
        status, tail = run_tests(fault, tree, timeout)
    finally:
        path.write_text(text)
    # An import that fails, or a test that hangs, is noticed too.
    outcome = "survived" if status == 0 else "caught" if status in (FAILED, None) else "error"
    return Outcome(fault.name, outcome, round(perf_counter() - started, 1), tail)


def run_tests(fault: Fault, tree: Path, timeout: float) -> tuple[int | None, str]:
    """Run a fault's tests. Returns the exit status, None if out of time, and the last lines."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    environment.pop("TRITON_INTERPRET", None)
    lane = ["-m", "kernels" if fault.interpret else "not kernels"]
    if fault.interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [*PYTEST, *lane, *fault.tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None, f"no result within {timeout:g} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (lines or done.stdout.splitlines()[-1:] or [""])[0][:200]


def run_all(faults: Sequence[Fault], tree: Path, jobs: int, timeout: float) -> Iterator[Outcome]:
    """Plant every fault, `jobs` at a time, each job in a copy of the tree of its own."""
    copies: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            copy = Path(folder) / str(number)
            shutil.copytree(tree, copy, ignore=SKIPPED, symlinks=True)
            copies.put(copy)

        def work(fault: Fault) -> Outcome:
            copy = copies.get()
            try:
                return plant(fault, copy, timeout)
            finally:
                copies.put(copy)

        yield from pool.map(work, faults)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command. Returns 1 if a fault was not caught (with `--check`, if a test fails)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tree", type=Path, default=ROOT, help="checkout to plant in (copied, never changed)")
    add("--faults", type=Path, default=FAULTS, help="file of faults (default: %(default)s)")
    add("--only", nargs="+", default=[], metavar="WORD", help="faults whose name has any of these")
    add("--jobs", type=int, default=1, help="faults at a time (default: 1)")
    add("--timeout", type=float, default=300, help="seconds per fault (default: 300)")
    add("--json", type=Path, metavar="FILE", help="write the outcomes, keeping those of others")
    add("--list", action="store_true", help="print the faults and stop")
    add("--check", action="store_true", help="plant nothing, run every set of tests once")
    arguments = parser.parse_args(words)
    faults = read_faults(arguments.faults, arguments.only)
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:<44} {fault.file}")
        return 0
    if arguments.check:  # nothing is changed, once per set of tests: all should survive
        distinct = {fault.tests: replace(fault, new=fault.old) for fault in faults}
        faults = list(distinct.values())
    counts: Counter[str] = Counter()
    path = arguments.json
    kept = json.loads(path.read_text()) if path and path.exists() else {}
    for outcome in run_all(faults, arguments.tree.resolve(), arguments.jobs, arguments.timeout):
        counts[outcome.outcome] += 1
        print(f"{outcome.outcome:<9}{outcome.seconds:7.1f} s  {outcome.name}", flush=True)
        if path:
            kept[outcome.name] = asdict(outcome)
            path.write_text(json.dumps(kept, indent=1) + "\n")
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())))
    return int(counts["survived" if arguments.check else "caught"] < len(faults))


if __name__ == "__main__":
    sys.exit(main())
