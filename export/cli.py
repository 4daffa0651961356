"""`ghm export`, `ghm attach`, `ghm inspect`, `ghm thresholds set` and `ghm verify`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghm_triton.options import Command, add_options, chosen, option
from ghm_triton.tables import printable

if TYPE_CHECKING:
    from export.card import DetectorCard

FAILED = 1
SMALLER = "smaller and faster (measured before and after; not written if it loses too much)"


@dataclass(frozen=True)
class ExportOptions:
    """Arguments of `export.detector.export_detector`."""

    checkpoint_path: Path = option(
        help="checkpoint.pt of a training run", flag="checkpoint", metavar="checkpoint"
    )
    output_path: Path = option(help="the file to write", flag="--out", metavar="ONNX")
    policy: str = option(
        "f1",
        "how thresholds are chosen: prior, f1, precision=P, recall=R or fixed=T",
        shown="f1; see ghm thresholds --help",
    )
    iou_threshold: float | None = option(
        None,
        "overlap from 0 to 1 that NMS allows",
        flag="--iou",
        metavar="IOU",
        shown="the checkpoint's",
    )
    name: str | None = option(None, "name of the detector", shown="architecture and backbone")
    input_type: str = option(
        "float32",
        "images that the file takes: float32, letterboxed and normalised; uint8, of any size, as"
        " they are; or both, with uint8 in a second file OUT.uint8.onnx",
        flag="--input",
        choices=("float32", "uint8", "both"),
    )


@dataclass(frozen=True)
class QuantizeOptions:
    """The part of `ghm export` that needs `--quantize`."""

    quantize: str | None = option(
        None,
        "precision of the network: int8, for CPUs, or fp16, for GPUs (slower on a CPU); box"
        " decoding, thresholds and NMS stay in float32",
        choices=("int8", "fp16"),
        group=SMALLER,
    )
    calibrate: str | None = option(
        None,
        "data set to calibrate on, derive thresholds from and measure on: digits, voc:FOLDER or"
        " coco:FOLDER",
        metavar="DATA",
        shown="the training data",
        group=SMALLER,
    )
    calibrate_split: str | None = option(
        None, "split to calibrate on", metavar="SPLIT", shown="the training split", group=SMALLER
    )
    calibrate_images: int = option(64, "images to calibrate on", metavar="N", group=SMALLER)
    test_split: str = option("test", "split to measure on", metavar="SPLIT", group=SMALLER)
    float_last: bool = option(
        False, "int8: keep the last layers, of classes and boxes, in float32", group=SMALLER
    )
    max_drop: float = option(
        1.0, "points (hundredths) of COCO AP that may be lost", metavar="POINTS", group=SMALLER
    )
    force: bool = option(False, "write the file whatever it loses", group=SMALLER)


def configure_export(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm export`."""
    parser.description = """\
Write a checkpoint's detector as one ONNX file with its weights, NMS, a threshold per class, and a
card with the evidence for the thresholds. The file takes batches of 1 to 64 images, and callers can
override the thresholds in any call.

With --quantize, average precision, size and latency are measured before and after, thresholds are
derived from the scores of the smaller detector, and a detector that loses too much is not written
(exit status 1):
  ghm export runs/digits/checkpoint.pt --out small.onnx --quantize int8

example:
  ghm export runs/digits/checkpoint.pt --out detector.onnx --policy precision=0.9"""
    add_options(parser, ExportOptions, QuantizeOptions)


def run_export(arguments: argparse.Namespace) -> int:
    """Run `ghm export`."""
    from export.detector import export_detector, output_paths
    from ghm_triton.evidence import ThresholdWarning

    requested = chosen(arguments, QuantizeOptions)
    if requested and "quantize" not in requested:
        raise ValueError(
            f"--{next(iter(requested)).replace('_', '-')} does nothing without --quantize"
        )
    if "float_last" in requested and requested["quantize"] != "int8":
        raise ValueError("--float-last does nothing without --quantize int8")
    options = ExportOptions(**chosen(arguments, ExportOptions))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        if requested:
            card = _export_quantized(QuantizeOptions(**requested), vars(options))
        else:
            card = export_detector(**vars(options))
    if card is None:
        return FAILED
    for warning in caught:  # without those of the exporter itself
        if issubclass(warning.category, ThresholdWarning):
            warnings.warn(warning.message, stacklevel=1)
    _print_written(card, *output_paths(options.output_path, options.input_type))
    return 0


def _export_quantized(asked: QuantizeOptions, options: dict[str, Any]) -> DetectorCard | None:
    """Print what was measured and write the file, unless it loses too much."""
    from export.quantize.convert import Int8Recipe
    from export.quantize.tradeoff import AccuracyLossError, export_quantized, open_splits
    from ghm_triton.detection.commands import report_problems
    from ghm_triton.detection.training.checkpoint import Checkpoint

    splits = open_splits(
        Checkpoint.load(options["checkpoint_path"]),
        asked.calibrate,
        calibration=asked.calibrate_split,
        test=asked.test_split,
    )
    for dataset in (splits.held_out, splits.test):
        report_problems(dataset)
    try:
        tradeoff = export_quantized(
            **options,
            precision=asked.quantize or "int8",
            splits=splits,
            images=asked.calibrate_images,
            recipe=Int8Recipe(float_last=asked.float_last),
            max_drop=asked.max_drop,
            force=asked.force,
        )
    except AccuracyLossError as error:
        print(error.tradeoff.table())
        print(f"ghm: {printable(str(error))}", file=sys.stderr)
        return None
    print(f"{tradeoff.table()}\n")
    return tradeoff.card


def _print_written(card: DetectorCard, *paths: Path, note: str = "") -> None:
    print(card.threshold_table())
    frame = card.preprocessing
    for path in paths:
        size = path.stat().st_size / 1e6
        name = printable(f"{path}: {card.name}")
        print(f"{name}, {frame.height}x{frame.width} px, {size:.1f} MB{note}")


@dataclass(frozen=True)
class AttachOptions:
    """Arguments of `export.attach.attach.attach`."""

    model_path: Path = option(help="an .onnx file", flag="model", metavar="model")
    card_path: Path = option(help="what the file does not contain", flag="--card", metavar="JSON")
    output_path: Path = option(help="the file to write", flag="--out", metavar="ONNX")
    layout: str | None = option(
        None, "layout of the outputs", choices=("yolo", "boxes+scores"), shown="by their number"
    )
    boxes: str | None = option(
        None,
        "the four numbers of a box",
        choices=("cxcywh", "xyxy"),
        shown="cxcywh for yolo, xyxy for boxes+scores",
    )
    unit: str | None = option(
        None,
        "of boxes: pixels of the input, or fractions of its sides",
        choices=("pixels", "normalised"),
        shown="pixels",
    )
    scores: str | None = option(
        None, "kind of scores", choices=("probability", "logit"), shown="probability"
    )


def configure_attach(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm attach`."""
    parser.description = """\
Give an ONNX detector that was trained elsewhere thresholds, NMS and a card, so that it can be
served, inspected and given other thresholds. The model takes float32 images [batch, 3, H, W] with a
dynamic batch, and yields [batch, 4 + C, A] as YOLO does, or boxes [batch, A, 4] and scores
[batch, A, C]. The card is JSON with at least these fields; export/attach/card.py has all:

  {"name": "yolo", "class_names": ["cat", "dog"], "thresholds": {"cat": 0.3, "dog": 0.25},
   "size": [640, 640]}

example:
  ghm attach yolo.onnx --card card.json --out detector.onnx"""
    add_options(parser, AttachOptions)


def run_attach(arguments: argparse.Namespace) -> int:
    """Run `ghm attach`."""
    from export.attach.attach import attach

    options = chosen(arguments, AttachOptions)
    card, made = attach(**options)
    note = f"; {made.layout}, {made.boxes} in {made.unit}, scores as {made.scores}"
    _print_written(card, options["output_path"], note=note)
    return 0


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm inspect`."""
    parser.description = """\
Print the card of an ONNX detector: the threshold of each class with its source and its precision
and recall on held-out images, inputs and outputs, and the training. The file is checked against its
contract first; nothing in it is run.

example:
  ghm inspect detector.onnx"""
    parser.add_argument("file", type=Path, help="a .onnx file that ghm export wrote")
    parser.add_argument("--json", action="store_true", help="print the card as it is in the file")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Run `ghm inspect`."""
    from export.file import read_detector
    from export.inspect import describe

    file = read_detector(arguments.file)
    print(file.card.to_json() if arguments.json else describe(file))
    return 0


def class_threshold(text: str) -> tuple[str, float]:
    """Parse `NAME=SCORE`; the name may contain a `=`.

    Example:
        >>> class_threshold("WBC=0.4")
        ('WBC', 0.4)
    """
    name, _, score = text.rpartition("=")
    try:
        value = float(score)
    except ValueError:
        name = ""
    if not name:
        raise argparse.ArgumentTypeError(f"expected NAME=SCORE such as WBC=0.4, got {text!r}")
    return name, value


@dataclass(frozen=True)
class SetOptions:
    """Arguments of `export.thresholds.rewrite_thresholds`."""

    path: Path = option(help="a .onnx file that ghm export wrote", flag="file", metavar="file")
    classes: Sequence[tuple[str, float]] = option(
        (),
        "the score from 0 to 1 that a detection of a class must reach; may be repeated",
        flag="--class",
        metavar="NAME=SCORE",
        shown="",
        type=class_threshold,
        action="append",
    )
    every: float | None = option(
        None, "the score of every class not named", flag="--all", metavar="SCORE"
    )
    iou_threshold: float | None = option(
        None, "overlap from 0 to 1 that NMS allows", flag="--iou", metavar="IOU"
    )


def configure_set(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm thresholds set`."""
    parser.description = """\
Rewrite an ONNX detector with thresholds set by hand, in its card and in its graph, for runtimes
where a call cannot override them. The card marks them as manual, with the held-out precision and
recall at each. Everything that is not named stays as it is.

example:
  ghm thresholds set detector.onnx --class WBC=0.4 --class RBC=0.5 --out strict.onnx"""
    add_options(parser, SetOptions)
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--out", type=Path, metavar="ONNX", help="the file to write")
    output.add_argument("--in-place", action="store_true", help="replace the file itself")


def run_set(arguments: argparse.Namespace) -> int:
    """Run `ghm thresholds set`."""
    from export.thresholds import rewrite_thresholds

    options = chosen(arguments, SetOptions)
    names = [name for name, _ in options.get("classes", ())]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"class {twice[0]!r} is set twice")
    options["classes"] = dict(options.get("classes", ()))
    out = options["path"] if arguments.in_place else arguments.out
    card = rewrite_thresholds(output_path=out, **options)
    print(card.threshold_table())
    print(f"{out}: IoU {card.iou_threshold:.4g}")
    return 0


@dataclass(frozen=True)
class VerifyOptions:
    """Options of `ghm verify`."""

    file: Path = option(help="a .onnx file that ghm export wrote", flag="file")
    checkpoint: Path = option(help="the checkpoint.pt it was exported from")
    data: str | None = option(
        None, "images: digits, voc:FOLDER or coco:FOLDER", shown="the training data"
    )
    split: str = option("test", "split of the data")
    images: int | None = option(None, "compare on N images of the split", metavar="N", shown="all")
    runtime: Sequence[str] = option(
        ("onnxruntime",),
        "runtime of the file; may be repeated. reference is onnx's own, and slow; all: those"
        " installed",
        choices=("onnxruntime", "openvino", "reference", "all"),
        shown="onnxruntime",
        type=str,
        action="append",
    )
    slow_images: int = option(2, "number of images that reference runs", metavar="N")


def configure_verify(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm verify`."""
    parser.description = """\
Check that an ONNX file detects the same as its checkpoint on real images, in batches of 1, 3 and 8,
with the file's thresholds and with others. Detections are matched one to one; boxes may differ by
0.1 px and scores by 0.0001. Prints the mAP of both on those images. The exit status is 1 if the
file differs from the checkpoint.

example:
  ghm verify detector.onnx --checkpoint runs/digits/checkpoint.pt --data digits --split test"""
    add_options(parser, VerifyOptions)


def run_verify(arguments: argparse.Namespace) -> int:
    """Run `ghm verify`."""
    from export.verify.verify import verify
    from ghm_triton.detection.data import open_dataset
    from ghm_triton.detection.training.checkpoint import Checkpoint

    options = VerifyOptions(**chosen(arguments, VerifyOptions))
    data = options.data or Checkpoint.load(options.checkpoint).training["data"]
    report = verify(
        options.file,
        options.checkpoint,
        open_dataset(data, options.split),
        images=options.images,
        runtimes=options.runtime,
        slow_images=options.slow_images,
    )
    print(report.table())
    return 0 if report.ok else FAILED


COMMANDS = tuple(
    Command(name, text, configure, run, "export")
    for name, text, configure, run in (
        ("export", "write a checkpoint as an ONNX detector", configure_export, run_export),
        (
            "attach",
            "give an ONNX detector trained elsewhere thresholds, NMS and a card",
            configure_attach,
            run_attach,
        ),
        ("inspect", "print the card of an ONNX detector", configure_inspect, run_inspect),
        ("thresholds set", "set thresholds of an ONNX detector by hand", configure_set, run_set),
        (
            "verify",
            "check that an ONNX detector detects the same as its checkpoint",
            configure_verify,
            run_verify,
        ),
    )
)
