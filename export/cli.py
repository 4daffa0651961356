"""`ghm export` and `ghm verify`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from ghm_triton.command import Command
from ghm_triton.tables import threshold_table

MISMATCH = 1


def configure_export(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm export`."""
    parser.description = """\
Write a checkpoint's detector as one ONNX file: weights, NMS, a threshold for every class, and a
card that says where they came from. The file takes batches of 1 to 64 images, and whoever runs it
may override the thresholds in any call.

example:
  ghm export runs/digits/checkpoint.pt --out detector.onnx --policy precision=0.9"""
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a training run")
    add("--out", type=Path, required=True, metavar="ONNX", help="the file to write")
    add(
        "--policy",
        default="f1",
        help="how thresholds are chosen: prior, f1, precision=P, recall=R or fixed=T"
        " (default: f1; see ghm thresholds --help)",
    )
    add(
        "--iou",
        type=float,
        metavar="IOU",
        help="overlap from 0 to 1 that NMS allows (default: the checkpoint's)",
    )
    add("--name", help="what the detector calls itself (default: architecture and backbone)")
    add(
        "--input",
        choices=("float32", "uint8", "both"),
        default="float32",
        help="images that the file takes: float32, letterboxed and normalised (default); uint8, as"
        " they are, of any size; or both, the second in a file OUT.uint8.onnx beside the first",
    )


def run_export(arguments: argparse.Namespace) -> int:
    """Carry out `ghm export`."""
    from export.detector import export_detector, output_paths
    from ghm_triton.thresholds import ThresholdWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        card = export_detector(
            arguments.checkpoint,
            arguments.out,
            policy=arguments.policy,
            iou_threshold=arguments.iou,
            name=arguments.name,
            input_type=arguments.input,
        )
    for warning in caught:  # the exporter's own talk stays behind
        if issubclass(warning.category, ThresholdWarning):
            warnings.warn(warning.message, stacklevel=1)
    print(threshold_table(card.threshold_policy, card.thresholds))
    frame = card.preprocessing
    for path in output_paths(arguments.out, arguments.input):
        size = path.stat().st_size / 1e6
        print(f"{path}: {card.name}, {frame.height}x{frame.width} px, {size:.1f} MB")
    return 0


def configure_verify(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm verify`."""
    parser.description = """\
Check that an ONNX file detects what its checkpoint detects: on real images, in batches of 1, 3
and 8, with the file's thresholds and with others. Detections are matched one to one; boxes may
differ by 0.1 px and scores by 0.0001. Exits with 1 when the file differs from the checkpoint.

example:
  ghm verify detector.onnx --checkpoint runs/digits/checkpoint.pt --data digits --split test"""
    add = parser.add_argument
    add("file", type=Path, help="a .onnx file that ghm export wrote")
    add("--checkpoint", type=Path, required=True, help="the checkpoint.pt it was exported from")
    add(
        "--data",
        help="images: digits, voc:FOLDER or coco:FOLDER (default: what it was trained on)",
    )
    add("--split", default="test", help="split of the data (default: test)")
    add("--images", type=int, metavar="N", help="compare on N images of the split (default: all)")


def run_verify(arguments: argparse.Namespace) -> int:
    """Carry out `ghm verify`."""
    from export.verify import verify
    from ghm_triton.detection.checkpoint import Checkpoint
    from ghm_triton.detection.data import open_dataset

    saved = Checkpoint.load(arguments.checkpoint)
    data = arguments.data or saved.training["data"]
    samples = open_dataset(data, arguments.split)  # only the images are looked at
    report = verify(arguments.file, arguments.checkpoint, samples, images=arguments.images)
    print(report.table())
    return 0 if report.ok else MISMATCH


COMMANDS = (
    Command(
        "export", "write a checkpoint as an ONNX detector", configure_export, run_export, "export"
    ),
    Command(
        "verify",
        "check that an ONNX detector detects what its checkpoint does",
        configure_verify,
        run_verify,
        "export",
    ),
)
