"""Compare exported files with their checkpoints on whole test splits.

Each checkpoint is exported and compared as by `ghm verify`: batches of 1, 3 and 8; the file's
thresholds, thresholds that show every class, and another NMS threshold. One JSON line per runtime,
with provenance. The exit status is 1 if a file differs from its checkpoint.

    python -m benchmarks.verify retinanet=runs/cells/checkpoint.pt fcos=runs/fcos/checkpoint.pt
    python -m benchmarks.verify --table
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, latest, markdown, read
from export.detector import export_detector
from export.runtimes import RUNTIME_NAMES, RUNTIMES
from export.verify.side_by_side import CHECKPOINT
from export.verify.verify import VerifyReport, verify
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ThresholdWarning

RESULTS = Path(__file__).parent / "results" / "verify.jsonl"
KEY = ("detector", "data", "runtime")
BATCHES = (1, 3, 8)


def main() -> int:
    """Compare the named checkpoints, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--data", help="default: what each was trained on")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIME_NAMES, default=RUNTIME_NAMES)
    parser.add_argument("--slow-images", type=int, default=2, help="that reference gets")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    problems: list[str] = []
    if not arguments.table:
        rows = Rows(arguments.out, provenance())
        for named in arguments.checkpoints:
            name, _, path = named.partition("=")
            made, wrong = compared(name, Path(path), arguments)
            problems += wrong
            for row in made:
                rows.add(row)
    print(table(latest(read(arguments.out), KEY)))
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems else 0


def compared(name: str, path: Path, asked: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Return the rows of one checkpoint, one per runtime, and the problems in words."""
    saved = Checkpoint.load(path)
    names = saved.config.class_names
    samples = open_dataset(asked.data or saved.training["data"], "test", class_names=names)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", ThresholdWarning)  # of classes that BCCD hardly shows
        file = Path(folder) / "detector.onnx"
        export_detector(path, file)
        report = verify(
            file,
            path,
            samples,
            batch_sizes=asked.batches,
            runtimes=asked.runtimes,
            slow_images=asked.slow_images,
        )
    config = saved.config
    about = {
        "detector": name,
        "architecture": config.architecture,
        "classifier": config.classifier,
        "backbone": config.backbone,
        "image_size": list(config.image_size),
        "steps": saved.training["step"],
        "data": samples.name,
    }
    return [{**about, **found} for found in findings(report, asked.slow_images)], report.problems


def findings(report: VerifyReport, slow_images: int) -> list[Row]:
    """Return one row per runtime of a report."""
    rows = []
    for kind in RUNTIMES:
        runs = [key for key in report.runs if key[0] == kind.name]
        if not runs:
            continue
        total, ap = report.total(kind.name), report.average_precision
        both = {"checkpoint_ap": CHECKPOINT, "file_ap": kind.name}
        rows.append(
            {
                "runtime": kind.name,
                "version": kind.title(),
                "images": min(report.images, slow_images) if kind.slow else report.images,
                "batches": sorted({size for _, _, size in runs}),
                "settings": len({setting for _, setting, _ in runs}),
                "detections": int(total.matched.sum()),
                "borderline": total.borderline,
                "mismatches": len(total.mismatches),
                "score": total.score,
                "box": total.box,
                **{key: round(ap[side].ap, 4) for key, side in both.items() if kind.name in ap},
            }
        )
    return rows


def table(rows: Iterable[Row]) -> str:
    """Format the rows: a line per detector and data set, a column per runtime."""
    rows = list(rows)
    versions = {row["runtime"]: row["version"] for row in rows}
    lines = []
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["detector"], row["data"]), {})[row["runtime"]] = row
    for (detector, data), own in found.items():
        measured = next((row for row in own.values() if "file_ap" in row), None)
        keys = ("checkpoint_ap", "file_ap")
        precision = ", ".join(f"{measured[key]:.4f}" for key in keys) if measured else ""
        about = {"detector": detector, "images of": data, "AP of checkpoint, file": precision}
        runs = {v: outcome(own[k]) if k in own else "" for k, v in versions.items()}
        lines.append(about | runs)
    return markdown(lines)


def outcome(row: Row) -> str:
    """Format the matched detections, images, and largest differences of a row."""
    text = f"{row['detections']:,} in {row['images']}: {row['score']:.0e}, {row['box']:.0e} px"
    if row["batches"] != list(BATCHES):
        text += f"; batches of {', '.join(map(str, row['batches']))} only"
    if row["borderline"]:
        text += f"; {row['borderline']} decided by rounding"
    if row["mismatches"]:
        text += f"; {row['mismatches']} wrong"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
