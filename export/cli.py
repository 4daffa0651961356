"""`ghm export`, `ghm attach`, `ghm inspect`, `ghm thresholds set` and `ghm verify`."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from export.quantize.cli import check_quantize, configure_quantize, run_quantize
from ghm_triton.command import Command

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
    configure_quantize(parser)


def run_export(arguments: argparse.Namespace) -> int:
    """Carry out `ghm export`."""
    from export.detector import export_detector, output_paths
    from ghm_triton.evidence import ThresholdWarning

    check_quantize(arguments)
    options = {
        "policy": arguments.policy,
        "iou_threshold": arguments.iou,
        "name": arguments.name,
        "input_type": arguments.input,
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThresholdWarning)
        if arguments.quantize:
            card = run_quantize(arguments, options)
        else:
            card = export_detector(arguments.checkpoint, arguments.out, **options)
    if card is None:
        return MISMATCH
    for warning in caught:  # the exporter's own talk stays behind
        if issubclass(warning.category, ThresholdWarning):
            warnings.warn(warning.message, stacklevel=1)
    print(card.threshold_table())
    frame = card.preprocessing
    for path in output_paths(arguments.out, arguments.input):
        size = path.stat().st_size / 1e6
        print(f"{path}: {card.name}, {frame.height}x{frame.width} px, {size:.1f} MB")
    return 0


def configure_attach(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm attach`."""
    parser.description = """\
Give somebody else's ONNX detector thresholds, NMS and a card, so that it can be served, inspected
and given other thresholds like our own. The model takes float32 images [batch, 3, H, W], a batch of
any size, and yields [batch, 4 + C, A] as YOLO does, or boxes [batch, A, 4] and scores
[batch, A, C]. The card is JSON; these it must have, export/attach/card.py has all:

  {"name": "yolo", "class_names": ["cat", "dog"], "thresholds": {"cat": 0.3, "dog": 0.25},
   "size": [640, 640]}

example:
  ghm attach yolo.onnx --card card.json --out detector.onnx"""
    add = parser.add_argument
    add("model", type=Path, help="an .onnx file")
    add("--card", type=Path, required=True, metavar="JSON", help="what the file does not say")
    add("--out", type=Path, required=True, metavar="ONNX", help="the file to write")
    add(
        "--layout",
        choices=("yolo", "boxes+scores"),
        help="of the outputs (default: by their shapes)",
    )
    add(
        "--boxes",
        choices=("cxcywh", "xyxy"),
        help="what four numbers are (default: cxcywh for yolo, xyxy for boxes+scores)",
    )
    add(
        "--unit",
        choices=("pixels", "normalised"),
        help="of boxes: pixels of the input, or shares of its sides (default: pixels)",
    )
    add(
        "--scores",
        choices=("probability", "logit"),
        help="what scores are (default: probability)",
    )


def run_attach(arguments: argparse.Namespace) -> int:
    """Carry out `ghm attach`."""
    from export.attach.attach import attach

    card, reading = attach(
        arguments.model,
        arguments.card,
        arguments.out,
        layout=arguments.layout,
        boxes=arguments.boxes,
        unit=arguments.unit,
        scores=arguments.scores,
    )
    print(card.threshold_table())
    frame, size = card.preprocessing, arguments.out.stat().st_size / 1e6
    read = f"{reading.layout}, {reading.boxes} in {reading.unit}, scores as {reading.scores}"
    print(f"{arguments.out}: {card.name}, {frame.height}x{frame.width} px, {size:.1f} MB; {read}")
    return 0


def configure_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm inspect`."""
    parser.description = """\
Print what an ONNX detector says of itself: every class with its threshold, where that comes from
and how precise it was on held-out images; what it takes and gives; what it was trained with. The
file is checked against its contract first, and nothing in it is run.

example:
  ghm inspect detector.onnx"""
    parser.add_argument("file", type=Path, help="a .onnx file that ghm export wrote")
    parser.add_argument("--json", action="store_true", help="print the card as it is in the file")


def run_inspect(arguments: argparse.Namespace) -> int:
    """Carry out `ghm inspect`."""
    from export.file import read_detector
    from export.inspect import describe

    file = read_detector(arguments.file)
    print(file.card.to_json() if arguments.json else describe(file))
    return 0


def configure_set(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm thresholds set`."""
    parser.description = """\
Write an ONNX detector anew with thresholds set by hand, in its card and in its graph together: for
runtimes where a call cannot override them. The card says which were set by hand, with the held-out
precision and recall there. What is not named stays as it is.

example:
  ghm thresholds set detector.onnx --class WBC=0.4 --class RBC=0.5 --out strict.onnx"""
    add = parser.add_argument
    add("file", type=Path, help="a .onnx file that ghm export wrote")
    add(
        "--class",
        dest="classes",
        action="append",
        default=[],
        type=class_threshold,
        metavar="NAME=SCORE",
        help="the score from 0 to 1 that a detection of a class must reach; may be repeated",
    )
    add("--all", type=float, metavar="SCORE", help="the score of every class not named")
    add("--iou", type=float, metavar="IOU", help="overlap from 0 to 1 that NMS allows")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=Path, metavar="ONNX", help="the file to write")
    place.add_argument("--in-place", action="store_true", help="replace the file itself")


def class_threshold(text: str) -> tuple[str, float]:
    """`WBC=0.4` as `("WBC", 0.4)`; a name may have a `=` in it."""
    name, _, score = text.rpartition("=")
    try:
        value = float(score)
    except ValueError:
        name = ""
    if not name:
        raise argparse.ArgumentTypeError(f"expected NAME=SCORE such as WBC=0.4, got {text!r}")
    return name, value


def run_set(arguments: argparse.Namespace) -> int:
    """Carry out `ghm thresholds set`."""
    from export.thresholds import rewrite_thresholds

    names = [name for name, _ in arguments.classes]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"class {twice[0]!r} is set twice")
    out = arguments.file if arguments.in_place else arguments.out
    card = rewrite_thresholds(
        arguments.file,
        out,
        dict(arguments.classes),
        every=arguments.all,
        iou_threshold=arguments.iou,
    )
    print(card.threshold_table())
    print(f"{out}: IoU {card.iou_threshold:.4g}")
    return 0


def configure_verify(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm verify`."""
    parser.description = """\
Check that an ONNX file detects what its checkpoint detects: on real images, in batches of 1, 3
and 8, with the file's thresholds and with others. Detections are matched one to one; boxes may
differ by 0.1 px and scores by 0.0001. Prints the mAP of both on those images. Exits with 1 when
the file differs from the checkpoint.

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
    add(
        "--runtime",
        action="append",
        choices=("onnxruntime", "openvino", "reference", "all"),
        help="what runs the file; may be repeated. reference is onnx's own, and slow. all: whatever"
        " is installed (default: onnxruntime)",
    )
    add(
        "--slow-images",
        type=int,
        default=2,
        metavar="N",
        help="how many of the images reference gets (default: 2)",
    )


def run_verify(arguments: argparse.Namespace) -> int:
    """Carry out `ghm verify`."""
    from export.verify.verify import verify
    from ghm_triton.detection.data import open_dataset
    from ghm_triton.detection.training.checkpoint import Checkpoint

    saved = Checkpoint.load(arguments.checkpoint)
    data = arguments.data or saved.training["data"]
    samples = open_dataset(data, arguments.split)
    report = verify(
        arguments.file,
        arguments.checkpoint,
        samples,
        images=arguments.images,
        runtimes=arguments.runtime or ["onnxruntime"],
        slow_images=arguments.slow_images,
    )
    print(report.table())
    return 0 if report.ok else MISMATCH


COMMANDS = (
    Command(
        "export", "write a checkpoint as an ONNX detector", configure_export, run_export, "export"
    ),
    Command(
        "attach",
        "give another's ONNX detector thresholds, NMS and a card",
        configure_attach,
        run_attach,
        "export",
    ),
    Command(
        "inspect",
        "what an ONNX detector says of itself",
        configure_inspect,
        run_inspect,
        "export",
    ),
    Command(
        "thresholds set",
        "set thresholds of an ONNX detector by hand",
        configure_set,
        run_set,
        "export",
    ),
    Command(
        "verify",
        "check that an ONNX detector detects what its checkpoint does",
        configure_verify,
        run_verify,
        "export",
    ),
)
