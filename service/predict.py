"""`ghm predict`: what the service would answer, without a server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghm_triton.command import Command

if TYPE_CHECKING:
    from PIL import Image

    from service.model import ServedModel
    from service.options import Wanted

_DESCRIPTION = """Find objects in images with a detector's file, by the thresholds it carries.

The answers are those of ghm serve. Each detection names the threshold that it passed.

examples:
  ghm predict detector.onnx photo.jpg
  ghm predict detector.onnx *.jpg --out annotated --threshold 0.3 --classes dog,cat
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm predict`."""
    parser.description = _DESCRIPTION
    add = parser.add_argument
    add("model", type=Path, help="the detector, a .onnx file that ghm export wrote")
    add("images", type=Path, nargs="+", metavar="image", help="JPEG, PNG, WebP, BMP, TIFF or GIF")
    add("--out", type=Path, metavar="FOLDER", help="also draw the detections into PNGs there")
    add("--threshold", metavar="T", help="one score for every class, in place of the file's")
    add("--thresholds", metavar="JSON", help="scores by class, such as '{\"dog\": 0.7}'")
    add("--classes", metavar="NAMES", help="only these classes, separated by commas")
    add("--iou", metavar="IOU", help="overlap from 0 to 1 that NMS allows (default: the file's)")
    add("--max-detections", metavar="N", help="at most so many an image, the best")
    add("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="what runs the model")
    add("--json", action="store_true", help="print a JSON object an image instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `ghm predict`.

    Raises:
        ValueError: A file, an image or an option does not fit; the message names it.
    """
    from export.file import read_detector
    from service.cpus import available_cpus
    from service.model import ModelError, ServedModel
    from service.options import parse_options, resolve
    from service.problems import ProblemError

    names = ("threshold", "thresholds", "classes", "iou", "max_detections")
    given = [(n, getattr(arguments, n)) for n in names if getattr(arguments, n) is not None]
    try:
        model = ServedModel(
            read_detector(arguments.model),
            provider=arguments.provider,
            threads=available_cpus(),
        )
        wanted = resolve(parse_options(given), model.card)
        for path in arguments.images:
            _predict_one(model, wanted, path, arguments)
    except (ProblemError, ModelError) as error:
        raise ValueError(str(error)) from error
    return 0


def _predict_one(
    model: ServedModel, wanted: Wanted, path: Path, arguments: argparse.Namespace
) -> None:
    from service.answers import image_answer
    from service.images import ImageError, decode, prepare
    from service.settings import MOST_PIXELS

    try:
        image = decode(path.read_bytes(), MOST_PIXELS)
    except ImageError as error:
        raise ValueError(f"{path}: {error}") from error
    row, geometry = prepare(image, model.card)
    found = model.detect(row[None], wanted.class_thresholds, wanted.iou_threshold)[0]
    answer = image_answer(geometry, found, wanted, model.card)
    if arguments.json:
        print(json.dumps({"source": str(path), **answer}))
    else:
        print(_table(path, answer["detections"]))
    if arguments.out:
        print(f"drawn: {_draw(image, answer['detections'], arguments.out / path.name)}")


def _table(path: Path, detections: list[dict[str, Any]]) -> str:
    lines = [f"{path}: {len(detections)} detection{'' if len(detections) == 1 else 's'}"]
    for found in detections:
        box = " ".join(f"{value:8.1f}" for value in found["box"])
        passed = f"{found['score']:.4f} >= {found['threshold']:.4f}"
        lines.append(f"  {found['class']:<16}  {passed}  box {box}")
    return "\n".join(lines)


def _draw(image: Image.Image, detections: list[dict[str, Any]], path: Path) -> Path:
    from ghm_triton.drawing import draw_detections

    target = path.with_suffix(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    shown = [(f["box"], f"{f['class']} {f['score']:.2f}", f["label"]) for f in detections]
    draw_detections(image, shown).save(target)
    return target


PREDICT = Command(
    "predict", "find objects in images with a detector's file", configure, run, "serve"
)
