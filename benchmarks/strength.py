"""Which strength trains best? The evidence behind the default.

Trains the same detector on the same scenes with each setting and seed, and reports average
precision on the test split. One JSON line a run, with provenance; runs already in the file are
not repeated, so an interrupted study goes on where it stopped.

    python -m benchmarks.strength --steps 600 --seeds 0 1 2
    python -m benchmarks.strength --table
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.trainings import training_parser
from ghm_triton.detection.checkpoint import Checkpoint
from ghm_triton.detection.config import DetectorConfig
from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.evaluate import detect, mean_average_precision, torch_predictor
from ghm_triton.detection.postprocess import DeployedDetector
from ghm_triton.detection.recipe import TrainOptions
from ghm_triton.detection.train import train

RESULTS = Path(__file__).parent / "results" / "strength.jsonl"


def ghm(strength: float, end: float | None = None) -> dict[str, Any]:
    """GHM-C and GHM-R of one strength, falling to `end` over training."""
    both = {"strength": strength, "reg_strength": strength}
    return {**both, "strength_end": end, "reg_strength_end": end}


SETTINGS: dict[str, dict[str, Any]] = {
    "focal + smooth L1": {"cls_loss": "focal", "reg_loss": "sl1"},
    "cross entropy + smooth L1": {"cls_loss": "ce", "reg_loss": "sl1"},
    "strength 0": ghm(0.0),
    "strength 0.25": ghm(0.25),
    "strength 0.25, falling to 0": ghm(0.25, 0.0),
    "strength 0.5": ghm(0.5),
    "strength 0.5, falling to 0": ghm(0.5, 0.0),
    "strength 1 (the paper)": ghm(1.0),
}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = training_parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    arguments = parser.parse_args()
    done = _read(arguments.out)
    if not arguments.table:
        for seed in arguments.seeds:
            for setting in arguments.settings:
                _run_once(arguments, setting, seed, done)
    print(table(done))


def _run_once(
    arguments: argparse.Namespace, setting: str, seed: int, done: list[dict[str, Any]]
) -> None:
    # The folder of a data set differs between machines; its name does not.
    data = ":".join(part.rsplit("/", 1)[-1] for part in arguments.data.split(":"))
    key = {
        "setting": setting,
        "seed": seed,
        "steps": arguments.steps,
        "data": data,
        "channels": arguments.channels,
    }
    if any(key.items() <= line.items() for line in done):
        return
    options = TrainOptions(
        data=arguments.data,
        train_split=arguments.train_split,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=seed,
        hflip=arguments.flips,
        vflip=arguments.flips,
        **SETTINGS[setting],
    )
    line = {**key, **measure(options, arguments.image_size, arguments.channels), **provenance()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    done.append(line)
    print(f"{setting}, seed {seed}: AP {line['ap']:.3f} AP50 {line['ap50']:.3f}", flush=True)


def measure(options: TrainOptions, size: tuple[int, int], channels: int) -> dict[str, Any]:
    """Train, and evaluate on the test split."""
    names = open_dataset(options.data, options.train_split).class_names
    config = DetectorConfig(class_names=names, image_size=size, channels=channels)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = train(options, config, Path(folder), progress=False).checkpoint
        seconds = time.perf_counter() - started
        detector = Checkpoint.load(path).detector()
    test = open_dataset(options.data, "test", class_names=names)
    predict = torch_predictor(DeployedDetector(detector))
    result = mean_average_precision(names, list(detect(predict, config, test)))
    return {
        "ap": round(result.ap, 4),
        "ap50": round(result.ap50, 4),
        "ap75": round(result.ap75, 4),
        "ap50_per_class": {name: round(ap50, 4) for name, (_, ap50) in result.per_class.items()},
        "batch_size": options.batch_size,
        "image_size": list(size),
        "seconds": round(seconds, 1),
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and range over seeds, as Markdown."""
    head = ("data", "channels", "steps", "setting", "seeds", "AP", "AP50")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in head[:4]), []).append(line)
    for what, runs in groups.items():
        ap, ap50 = (_spread([run[name] for run in runs]) for name in ("ap", "ap50"))
        rows.append(f"| {' | '.join(map(str, what))} | {len(runs)} | {ap} | {ap50} |")
    return "\n".join(rows)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
