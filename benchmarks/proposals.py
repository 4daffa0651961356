r"""Recall of two proposal networks, and average precision of the detectors behind them.

Trains Faster R-CNN with torchvision's sampled proposals, and with proposals that learn from every
anchor by its cleanliness (GHM-C, soft labels, optimal bias), on the same images in the same number
of steps. Reports the recall of the first 100, 300 and 1000 proposals on the test split, and average
precision. One JSON line per run, with provenance; recorded runs are not repeated.

    python -m benchmarks.proposals --steps 600 --seeds 0 1 2
    python -m benchmarks.proposals --data voc:path/to/BCCD --train-split trainval \
        --image-size 256x320 --channels 64 --flips 0.5 --batch-size 8 --steps 500 --seeds 0 1 2
    python -m benchmarks.proposals --table
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, current, markdown, read
from benchmarks.trainings import precision_on_test, trained, training_parser
from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.data.loader import TrainingView
from ghm_triton.detection.models.faster_rcnn import FasterRCNNDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.config import TrainOptions

RESULTS = Path(__file__).parent / "results" / "proposals.jsonl"
COUNTS = (100, 300, 1000)
IOUS = tuple(i / 100 for i in range(50, 100, 5))  # COCO's
NETWORKS = {"sampled (torchvision)": "iou", "clean, GHM-C over all anchors": "cleanliness"}
MEASURED = ("ap", "ap50", *(f"{name}@{k}" for name in ("ar", "recall50") for k in COUNTS))


def main() -> None:
    """Run the missing measurements, then print the table."""
    parser = training_parser(__doc__.splitlines()[0], RESULTS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    if not arguments.table:
        rows = Rows(arguments.out, provenance())
        for seed in arguments.seeds:
            for network in arguments.networks:
                key = {**run_key(arguments), "network": network, "seed": seed}
                if not rows.here(key):
                    print(rows.add({**key, **measure(network, seed, arguments)}), flush=True)
    print(table(current(read(arguments.out))))


def run_key(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields that identify a run, besides network and seed."""
    # The folder of a data set differs between machines; its name does not.
    data = ":".join(part.rsplit("/", 1)[-1] for part in arguments.data.split(":"))
    return {
        "data": data,
        "train_split": arguments.train_split,
        "image_size": list(arguments.image_size),
        "channels": arguments.channels,
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "flips": arguments.flips,
    }


def measure(network: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate on the test split."""
    options = TrainOptions(
        data=arguments.data,
        train_split=arguments.train_split,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=seed,
        hflip=arguments.flips,
        vflip=arguments.flips,
    )
    started = time.perf_counter()
    saved = trained(
        options,
        image_size=arguments.image_size,
        channels=arguments.channels,
        architecture="faster-rcnn",
        assigner=NETWORKS[network],
    )
    seconds = time.perf_counter() - started
    test = open_dataset(options.data, "test", class_names=saved.config.class_names)
    precision = precision_on_test(saved, options.data)
    numbers = {**precision, **recall(best_overlaps(saved, test))}
    rounded = {name: round(value, 4) for name, value in numbers.items()}
    return {**rounded, "seconds": round(seconds, 1)}


@torch.inference_mode()
def best_overlaps(saved: Checkpoint, dataset: DetectionDataset) -> dict[int, Tensor]:
    """Best IoU of every box with the first `k` proposals, `[boxes]`, for each `k` of COUNTS."""
    config = replace(saved.config, proposals=max(COUNTS), candidates=max(COUNTS))
    detector = Checkpoint(config, saved.model, saved.statistics, {}).detector()
    assert isinstance(detector, FasterRCNNDetector)  # noqa: S101 - for the type checker
    view = TrainingView(dataset, config, (0.0, 0.0))
    overlaps: dict[int, list[Tensor]] = {count: [] for count in COUNTS}
    for index in range(len(dataset)):
        image, target = view[index, 0]
        boxes = target["boxes"][~target["ignore"]]
        if len(boxes):
            features = detector.features(image.unsqueeze(0))
            (proposals,), _ = detector.rpn.propose(list(features.values()))
            for count in COUNTS:
                overlaps[count].append(box_iou(boxes, proposals[:count]).amax(dim=1))
    return {count: torch.cat(rows) for count, rows in overlaps.items()}


def recall(overlaps: dict[int, Tensor]) -> dict[str, float]:
    """Recall at an IoU of 0.5, and its average over COCO's ten thresholds."""
    found = {}
    for count, best in overlaps.items():
        shares = [float((best >= iou).float().mean()) for iou in IOUS]
        found[f"recall50@{count}"] = shares[0]
        found[f"ar@{count}"] = statistics.mean(shares)
    return found


def table(rows: Iterable[Row]) -> str:
    """Format mean and range over seeds as a Markdown table."""
    head = ("data", "train_split", "channels", "steps", "network")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in head), []).append(row)
    return markdown(
        dict(zip(head, what, strict=True))
        | {"seeds": len(runs)}
        | {name: _spread([run[name] for run in runs]) for name in MEASURED}
        for what, runs in groups.items()
    )


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
