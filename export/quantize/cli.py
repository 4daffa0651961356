"""`ghm export --quantize`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.card import DetectorCard

IMAGES = 64
TEST_SPLIT = "test"
MAX_DROP = 1.0


def configure_quantize(parser: argparse.ArgumentParser) -> None:
    """Describe what makes a file smaller and faster."""
    group = parser.add_argument_group(
        "smaller and faster",
        """\
Average precision, size and latency are measured before and after, thresholds are derived from the
scores of the smaller detector, and one that loses too much is not written (exit code 1):
  ghm export runs/digits/checkpoint.pt --out small.onnx --quantize int8""",
    )
    add = group.add_argument
    add(
        "--quantize",
        choices=("int8", "fp16"),
        help="what the network computes with: int8, for CPUs, or fp16, for GPUs (a CPU is slower"
        " with it); box decoding, thresholds and NMS stay in float32",
    )
    add(
        "--calibrate",
        metavar="DATA",
        help="data set to calibrate on, derive thresholds and measure with: digits, voc:FOLDER or"
        " coco:FOLDER (default: what it was trained on)",
    )
    add(
        "--calibrate-split",
        metavar="SPLIT",
        help="split to calibrate on (default: the one learnt from)",
    )
    add("--calibrate-images", type=int, metavar="N", help=f"images of it (default: {IMAGES})")
    add("--test-split", metavar="SPLIT", help=f"split to measure on (default: {TEST_SPLIT})")
    add(
        "--float-last",
        action="store_true",
        help="int8: leave the last layers, which say classes and boxes, in float32",
    )
    add(
        "--max-drop",
        type=float,
        metavar="POINTS",
        help=f"points (hundredths) of COCO AP that may be lost (default: {MAX_DROP:g})",
    )
    add("--force", action="store_true", help="write the file whatever it loses")


def check_quantize(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        ValueError: One is given without the option that it belongs to.
    """
    names = ("calibrate", "calibrate_split", "calibrate_images", "test_split", "max_drop")
    given = [name for name in names if getattr(arguments, name) is not None]
    given += [name for name in ("float_last", "force") if getattr(arguments, name)]
    if given and not arguments.quantize:
        raise ValueError(f"--{given[0].replace('_', '-')} does nothing without --quantize")
    if arguments.float_last and arguments.quantize != "int8":
        raise ValueError("--float-last does nothing without --quantize int8")


def run_quantize(arguments: argparse.Namespace, options: dict[str, Any]) -> DetectorCard | None:
    """Measure, print the table, and write the file if it is good enough.

    Args:
        arguments: Of `ghm export`.
        options: What both kinds of export take.

    Returns:
        The card of the file, None if none was written.
    """
    from export.quantize.convert import Int8Recipe
    from export.quantize.tradeoff import AccuracyLossError, export_quantized, open_splits
    from ghm_triton.detection.commands import report_problems
    from ghm_triton.detection.training.checkpoint import Checkpoint

    splits = open_splits(
        Checkpoint.load(arguments.checkpoint),
        arguments.calibrate,
        calibration=arguments.calibrate_split,
        test=arguments.test_split or TEST_SPLIT,
    )
    for dataset in (splits.held_out, splits.test):
        report_problems(dataset)
    try:
        tradeoff = export_quantized(
            arguments.checkpoint,
            arguments.out,
            arguments.quantize,
            splits,
            images=IMAGES if arguments.calibrate_images is None else arguments.calibrate_images,
            recipe=Int8Recipe(float_last=arguments.float_last),
            max_drop=MAX_DROP if arguments.max_drop is None else arguments.max_drop,
            force=arguments.force,
            **options,
        )
    except AccuracyLossError as error:
        print(error.tradeoff.table())
        print(f"ghm: {error}", file=sys.stderr)
        return None
    print(f"{tradeoff.table()}\n")
    return tradeoff.card
