"""Costs of the kernels, read from their binaries; needs no GPU.

    python -m benchmarks.sass --targets sm_90 --dtypes fp32 bf16 --kernels count_bce --lines
    python -m benchmarks.sass --check       # fails if a kernel is worse than the baseline
    python -m benchmarks.sass --update      # writes the baseline anew
    python -m benchmarks.sass --markdown    # the table of the README, from the baseline

Registers, spills and shared memory; then, of the hot path (see `benchmarks.disassembly`),
instructions and special functions an element, and the widths of loads and stores.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from benchmarks.costs import Costs, complaints, measure
from benchmarks.disassembly import Counts
from benchmarks.kernels import TARGETS, Variant, variants

BASELINE = Path(__file__).parent / "results" / "sass.jsonl"
DTYPES = ["fp32", "bf16"]


def chosen(dtypes: Iterable[str], kernels: list[str] | None = None) -> Iterator[Variant]:
    """Yield the variants whose key starts with one of `kernels`; all without."""
    for variant in variants(list(dtypes)):
        if not kernels or variant.key.startswith(tuple(kernels)):
            yield variant


def read(path: Path) -> dict[tuple[str, str], Costs]:
    """Read a baseline, by kernel and target."""
    rows = [Costs(**json.loads(line)) for line in path.read_text().splitlines()]
    return {(row.kernel, row.target): row for row in rows}


def write(path: Path, rows: Iterable[Costs]) -> None:
    """Write a baseline in canonical order."""
    order = list(TARGETS)
    ordered = sorted(rows, key=lambda row: (order.index(row.target), row.kernel))
    path.write_text("".join(json.dumps(row.line()) + "\n" for row in ordered))


def check(rows: list[Costs], baseline: dict[tuple[str, str], Costs], whole: bool) -> list[str]:
    """List regressions; with `whole`, also kernels that only the baseline has."""
    found = []
    for row in rows:
        found += complaints(baseline.get((row.kernel, row.target)), row)
    if whole:
        present, targets = {(row.kernel, row.target) for row in rows}, {r.target for r in rows}
        gone = [key for key in baseline if key[1] in targets and key not in present]
        found += [f"{kernel} on {target} is only in the baseline" for kernel, target in gone]
    return found


def incomparable(rows: list[Costs], baseline: dict[tuple[str, str], Costs]) -> set[str]:
    """Pairs of compilers, the baseline's and ours, that differ."""
    pairs = {
        (baseline[key].compiler, row.compiler)
        for row in rows
        if (key := (row.kernel, row.target)) in baseline
    }
    return {f"{old}, not {new}" for old, new in pairs if old != new}


def table(rows: Iterable[Costs]) -> str:
    """Format the README's table: kernels that work on elements, on sm_90, dtypes in one cell."""
    kernels: dict[str, list[Costs]] = {}
    for row in sorted(rows, key=lambda row: [*DTYPES, ""].index(_dtype(row))):
        if row.target == "sm_90" and row.elements:
            name = row.kernel.removesuffix(f".{_dtype(row)}").replace("_kernel", "")
            kernels.setdefault(name.replace(".", " "), []).append(row)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for name, found in sorted(kernels.items()):
        cells = [name, *(_cell(found, show) for show in COLUMNS.values() if show)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _dtype(row: Costs) -> str:
    last = row.kernel.rpartition(".")[2]
    return last if last in DTYPES else ""


def _cell(rows: list[Costs], show: Callable[[Costs], str]) -> str:
    """Join the values of all dtypes; a single value if they are equal."""
    return " / ".join(dict.fromkeys(map(show, rows)))


def _roof(name: str) -> Callable[[Costs], str]:
    """Format 10^9 elements per second; a dash for no bound."""
    return lambda row: f"{row.roofs[name] / 1e9:.0f}".replace("inf", "-")


COLUMNS: dict[str, Callable[[Costs], str] | None] = {
    "kernel": None,
    "instructions": lambda row: f"{row.instructions:.1f}",
    "special functions": lambda row: f"{row.special + row.conversions:.1f}",
    "bytes per load, per store": lambda row: ", ".join(str(w) for w in row.widths.values() if w),
    "registers": lambda row: str(row.registers),
    "memory": _roof("memory"),
    "issue": _roof("issue"),
    "special": _roof("special"),
    "bound by": lambda row: min(row.roofs, key=row.roofs.__getitem__),
}


HEADER = (
    f"{'kernel':34} {'target':7} {'instr/el':>8} {'special':>7} {'convert':>7} {'regs':>4} "
    f"{'spill':>5} {'shared':>6} {'outside':>7} {'el/thread':>9}  loads; stores (times x bytes)"
)


def text(row: Costs) -> str:
    """One line for the terminal."""
    per, moves = " " * 24, ""
    if row.elements:
        per = f"{row.instructions:8.1f} {row.special:7.2f} {row.conversions:7.2f}"
        both = ((f"{n}x{size}" for size, n in kind.items()) for kind in (row.loads, row.stores))
        moves = f"{row.elements:9.0f}  " + "; ".join(map(" ".join, both))
    return (
        f"{row.kernel:34} {row.target:7} {per} {row.registers:4} {row.spilled_bytes:5} "
        f"{row.shared_bytes:6} {row.outside:7} {moves}"
    )


def detail(row: Costs, counts: Counts, opcodes: bool, lines: bool) -> Iterator[str]:
    """Yield opcodes or lines of the hot path with their counts, per element if there are any."""
    each = row.elements or 1.0
    for name, times in counts.opcodes.items() if opcodes else ():
        yield f"    {times / each:7.2f} {name}"
    for name, times in sorted(counts.places.items()) if lines else ():
        yield f"    {times / each:7.2f} {name}"


def main(arguments: list[str] | None = None) -> int:
    """Print the report, or compare it with the baseline. Returns 1 for a regression."""
    options = parse(arguments)
    if options.markdown:
        print(table(read(options.baseline).values()))
        return 0
    print(HEADER)
    rows = []
    for target in options.targets:
        for variant in chosen(options.dtypes, options.kernels):
            row, counts = measure(variant, target)
            rows.append(row)
            print(text(row), flush=True)
            for line in detail(row, counts, options.opcodes, options.lines):
                print(line)
    if options.update:
        update(rows, options)
    return compare(rows, options) if options.check else 0


def update(rows: list[Costs], options: argparse.Namespace) -> None:
    """Replace the rows of the same targets, or kernels, in the baseline."""
    old = read(options.baseline) if options.baseline.exists() else {}
    kept = {
        key: row for key, row in old.items() if options.kernels or key[1] not in options.targets
    }
    write(options.baseline, {**kept, **{(row.kernel, row.target): row for row in rows}}.values())


def compare(rows: list[Costs], options: argparse.Namespace) -> int:
    """Print regressions to stderr. Returns 1 if there are any."""
    baseline = read(options.baseline)
    for pair in sorted(incomparable(rows, baseline)):
        print(f"the baseline is of {pair}: only spills and widths are checked", file=sys.stderr)
    worse = check(rows, baseline, whole=options.kernels is None)
    for complaint in worse:
        print(complaint, file=sys.stderr)
    if worse:
        print("Where this is meant: python -m benchmarks.sass --update", file=sys.stderr)
    return 1 if worse else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES)
    parser.add_argument("--kernels", nargs="+", help="how their keys start; default: all")
    parser.add_argument("--opcodes", action="store_true", help="also which opcodes, an element")
    parser.add_argument("--lines", action="store_true", help="also from which lines of source")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="fail when worse than the baseline")
    action.add_argument("--update", action="store_true", help="put these numbers in the baseline")
    action.add_argument("--markdown", action="store_true", help="print the baseline as a table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
