"""Check the claims about speed against measured rows.

    python -m benchmarks.claims runs/gpu/*.jsonl
    python -m benchmarks.claims                      # the rows of benchmarks/results

A claim about several sizes is judged at the worst of them; without rows it is `not measured`. The
exit status is 1 if a claim fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.result_file import BOTH, Row, current, latest, markdown, matches, read

RESULTS = Path(__file__).parent / "results"
KEYS = ("gpu", "device", "task", "entries", "dtype", "target", "loss", "stage", "shape")
HOLDS, FAILS, ABSENT = "holds", "FAILS", "not measured"
CPU_ENTRIES = 10**6
ROOF = 2**25  # entries from which memory bandwidth alone should bound the time


@dataclass(frozen=True)
class Claim:
    """A bound on a figure of the rows.

    Attributes:
        text: The claim.
        key: Fields of the rows that it applies to.
        figure: Takes the figure from a row; None if the row lacks it.
        bound: The limit.
        least: Whether the figure must be at least the bound instead of at most.
        entries: Minimum number of entries of a row.
    """

    text: str
    key: Row
    figure: Callable[[Row], float | None]
    bound: float
    least: bool = False
    entries: int = 0

    def judge(self, rows: Sequence[Row]) -> Row:
        """Return the verdict, the worst figure and where it was measured."""
        about = [row for row in rows if matches(row, self.key)]
        about = [row for row in about if row.get("entries", 0) >= self.entries]
        failed = [row for row in about if "error" in row]
        found = [(value, row) for row in about if (value := self._value(row)) is not None]
        verdict: Row = {"claim": self.text, "bound": self.bound, "measured": None, "where": ""}
        if not found:
            return verdict | {"verdict": ABSENT, "where": failed[0]["error"] if failed else ""}
        value, worst = (min if self.least else max)(found, key=lambda each: each[0])
        holds = value >= self.bound if self.least else value <= self.bound
        where = f"{_place(worst)}; worst of {len(found)}"
        if failed:
            where += f"; {len(failed)} failed: {failed[0]['error']}"
        outcome = HOLDS if holds and not failed else FAILS
        return verdict | {"verdict": outcome, "measured": value, "where": where}

    def _value(self, row: Row) -> float | None:
        return None if "error" in row else self.figure(row)


def _place(row: Row) -> str:
    parts = [row.get("dtype"), row.get("target"), row.get("entries"), row.get("shape")]
    parts += [row.get("image_size"), row.get("gpu") or row.get("cpu")]
    return ", ".join(str(part) for part in parts if part is not None)


def _number(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get(name)


def _ratio(name: str) -> Callable[[Row], float | None]:
    return lambda row: row.get("ratios", {}).get(name)


def _speedup(name: str) -> Callable[[Row], float | None]:
    def figure(row: Row) -> float | None:
        ratio = row.get("ratios", {}).get(name)
        return 1 / ratio if ratio else None

    return figure


GHM_C = {"loss": "ghm_c triton", "stage": BOTH, "target": "index", "device": "cuda"}
STEP = {"loss": "ghm", "stage": "step", "device": "cuda"}
CPU = {"stage": BOTH, "device": "cpu", "entries": CPU_ENTRIES, "dtype": "float32"}


def _claims() -> list[Claim]:
    claims = []
    for dtype, size in (("float32", 12), ("bfloat16", 6)):
        about = f"GHM-C, {dtype}, 2^25 entries and more: "
        key = {**GHM_C, "dtype": dtype}
        share = _number("share_of_copy")
        text = f"{about}share of the copy bandwidth on {size} bytes an entry"
        claims.append(Claim(text, key, share, 0.85, least=True, entries=ROOF))
        text = f"{about}times as fast as MMDetection's"
        fast = _speedup("ghm_c released")
        claims.append(Claim(text, key, fast, 40.0, least=True, entries=ROOF))
        for peer, said in (
            ("bce one-hot compiled", "compiled plain BCE of the same class indices"),
            ("bce compiled", "compiled plain BCE of dense targets ready made"),
        ):
            text = f"{about}times the time of {said}"
            claims.append(Claim(text, key, _ratio(peer), 1.0, entries=ROOF))
    for loss, said in (("ghm_c", "GHM-C"), ("ghm_r", "GHM-R"), ("ghm_softmax", "softmax GHM")):
        key = {"loss": f"{loss} triton", "stage": BOTH, "device": "cuda"}
        text = f"{said}, 2^23 entries and more: peak memory by that of the predictions"
        claims.append(Claim(text, key, _number("peak_ratio"), 1.05, entries=2**23))
    for peer, said in (("bce", "plain BCE's"), ("bce compiled", "compiled plain BCE's")):
        text = f"RetinaNet-R50 training step with GHM: times {said}"
        claims.append(Claim(text, STEP, _ratio(peer), 1.02))
    claims += _cpu_claims()
    text = "repeated runs on a GPU that gave other bits"
    key = {"stage": "repeat", "device": "cuda"}
    return [*claims, Claim(text, key, _number("differing"), 0)]


def _cpu_claims() -> list[Claim]:
    claims = []
    for target in ("index", "dense"):
        key = {**CPU, "loss": "ghm_c torch", "target": target}
        about = f"GHM-C on a CPU, 1M entries, {target} targets: "
        claims.append(Claim(f"{about}times plain BCE's time", key, _ratio("bce"), 2.0))
        text = f"{about}times as fast as MMDetection's"
        claims.append(Claim(text, key, _speedup("ghm_c released"), 5.0, least=True))
    key = {**CPU, "loss": "ghm_r torch"}
    text = "GHM-R on a CPU, 1M entries: times as fast as MMDetection's"
    return [*claims, Claim(text, key, _speedup("ghm_r released"), 5.0, least=True)]


CLAIMS = _claims()


def judge(rows: Sequence[Row], device: str | None = None) -> list[Row]:
    """Return a verdict per claim, only those about `device` if it is given.

    Of repeated measurements only the last counts.
    """
    rows = latest(rows, KEYS)
    claims = [claim for claim in CLAIMS if device in (None, claim.key["device"])]
    return [claim.judge(rows) for claim in claims]


def table(verdicts: Sequence[Row]) -> str:
    """Format the verdicts as a Markdown table."""
    return markdown(
        {
            "verdict": each["verdict"],
            "measured": "" if each["measured"] is None else f"{each['measured']:.3g}",
            "bound": f"{each['bound']:g}",
            "claim": each["claim"],
            "where": " ".join(each["where"].replace("|", "/").split())[:160],
        }
        for each in verdicts
    )


def main() -> None:
    """Judge, print, and exit with 1 if a claim fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("files", type=Path, nargs="*", help="JSON lines; default: recorded ones")
    parser.add_argument("--out", type=Path, help="also write the verdicts here, as JSON lines")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="only the claims about it")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    rows = [row for file in files for row in current(read(file))]
    verdicts = judge(rows, options.device)
    if options.out:
        options.out.write_text("".join(json.dumps(each) + "\n" for each in verdicts))
    print(table(verdicts))
    sys.exit(any(each["verdict"] == FAILS for each in verdicts))


if __name__ == "__main__":
    main()
