"""Precision, size and latency of detectors in float32, fp16 and several recipes of int8.

Int8 is calibrated on 64 images of the training split. All files are evaluated on the test split and
timed in turns: one image, one thread. `--untrained` only times a detector with random weights.

    python -m benchmarks.quantize digits=runs/demo/checkpoint.pt BCCD=runs/cells/checkpoint.pt
    python -m benchmarks.quantize --untrained resnet18:320x320
    python -m benchmarks.quantize --table
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from benchmarks.provenance import provenance
from benchmarks.result_file import Row, Rows, latest, markdown, read
from export.graph import build_graph
from export.quantize.convert import Int8Recipe, to_float16, to_int8
from export.quantize.tradeoff import Image, measure, open_splits, prepared, race, spread
from ghm_triton.detection.models.config import DetectorConfig, image_size
from ghm_triton.detection.models.registry import build_detector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.evidence import ClassThresholds

RESULTS = Path(__file__).parent / "results" / "quantize.jsonl"
KEY = ("detector", "architecture", "backbone", "image_size", "variant")
IMAGES = 64
BEFORE = "float32"
# Each differs from the default in one option.
RECIPES = {
    "int8": Int8Recipe(),
    "int8, 8-bit weights": Int8Recipe(weight_bits=8),
    "int8, whole ranges": Int8Recipe(coverage=100.0),
    "int8, 99.9 % of ranges": Int8Recipe(coverage=99.9),
    "int8, a scale a tensor": Int8Recipe(per_channel=False),
    "int8, last layers float32": Int8Recipe(float_last=True),
}


def main() -> None:
    """Measure the named detectors, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT")
    parser.add_argument("--untrained", nargs="+", default=[], metavar="BACKBONE:HxW")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    if not arguments.table:
        rows = Rows(arguments.out, origin())
        for named in arguments.checkpoints:
            name, _, path = named.partition("=")
            for row in trained(name, Path(path)):
                rows.add(row)
        for described in arguments.untrained:
            for row in untrained(described):
                rows.add(row)
    print(table(latest(read(arguments.out), KEY)))


def origin() -> Row:
    """Return the provenance with what determines integer speed: runtime and processor."""
    return {**provenance(), "onnxruntime": _runtime(), "vnni": has_vnni()}


def _runtime() -> str | None:
    for package in ("onnxruntime-gpu", "onnxruntime"):
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
    return None


def has_vnni() -> bool | None:
    """Whether the processor has VNNI; None if unknown."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() not in ("x86_64", "AMD64") or not cpuinfo.exists():
        return None
    return "_vnni" in cpuinfo.read_text()


def variants(model: ModelProto, images: list[Image]) -> dict[str, bytes]:
    """Convert a graph by every recipe."""
    made = {BEFORE: model, "fp16": to_float16(model)}
    made |= {name: to_int8(model, images, recipe) for name, recipe in RECIPES.items()}
    return {name: each.SerializeToString(deterministic=True) for name, each in made.items()}


def trained(name: str, path: Path) -> Iterator[Row]:
    """Yield precision, size and latency of every variant of a checkpoint."""
    checkpoint = Checkpoint.load(path)
    config, splits = checkpoint.config, open_splits(checkpoint)
    thresholds = ClassThresholds.from_statistics(checkpoint.statistics, "f1").as_array()
    model = build_graph(checkpoint.detector(), thresholds.tolist(), config.iou_threshold)
    chosen = spread(len(splits.calibration), IMAGES)
    files = variants(model, prepared(splits.calibration, config, chosen))
    measured = measure(files, config, splits.test)
    for each in measured:
        yield {
            **_described(name, config, each.precision),
            "data": splits.test.name,
            "steps": checkpoint.training["step"],
            "test_images": each.quality.images,
            "calibration_images": len(chosen),
            "ap": round(each.quality.ap, 4),
            "ap50": round(each.quality.ap50, 4),
            "ap_per_class": {
                name: round(ap, 4) for name, (ap, _) in each.quality.per_class.items()
            },
            "bytes": each.size,
            "ms": round(each.milliseconds, 3),
            "times_as_fast": round(measured[0].milliseconds / each.milliseconds, 2),
        }


def untrained(described: str) -> Iterator[Row]:
    """Yield size and latency of every variant of a detector with random weights."""
    backbone, _, size = described.partition(":")
    config = DetectorConfig(("a", "b", "c"), image_size(size), backbone=backbone)
    torch.manual_seed(0)
    model = build_graph(build_detector(config), [0.5] * 3, config.iou_threshold)
    generator = np.random.default_rng(0)
    images = [generator.standard_normal((3, *config.image_size), np.float32) for _ in range(4)]
    files = variants(model, images)
    times = race(list(files.values()), images)
    for (variant, content), milliseconds in zip(files.items(), times, strict=True):
        yield {
            **_described("untrained", config, variant),
            "bytes": len(content),
            "ms": round(milliseconds, 3),
            "times_as_fast": round(times[0] / milliseconds, 2),
        }


def _described(name: str, config: DetectorConfig, variant: str) -> Row:
    recipe: dict[str, Any] = asdict(RECIPES[variant]) if variant in RECIPES else {}
    return {
        "detector": name,
        "architecture": config.architecture,
        "backbone": config.backbone,
        "image_size": list(config.image_size),
        "variant": variant,
        "recipe": recipe,
    }


def table(rows: Iterable[Row]) -> str:
    """Format the rows as a Markdown table."""
    return markdown(
        {
            "detector": f"{row['detector']}, {row['architecture']}-{row['backbone']},"
            f" {'x'.join(map(str, row['image_size']))}",
            "computes with": row["variant"],
            "AP": f"{row['ap']:.3f}" if "ap" in row else "",
            "AP50": f"{row['ap50']:.3f}" if "ap50" in row else "",
            "size, MB": f"{row['bytes'] / 1e6:.2f}",
            "latency, ms": f"{row['ms']:.2f}",
            "as fast": f"{row['times_as_fast']:.2f}x",
        }
        for row in rows
    )


if __name__ == "__main__":
    main()
