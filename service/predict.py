"""`ghm predict`: what the service would answer, without a server; or what one does answer."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghm_triton.command import Command

if TYPE_CHECKING:
    from PIL import Image

    from service.core.detections import DetectionParams
    from service.engine.session import ServedModel

_DESCRIPTION = """Find objects in images with a detector's file, by the thresholds it carries.

The answers are those of ghm serve. Each detection names the threshold that it passed. With --url a
running service answers instead, and no detector is named.

examples:
  ghm predict detector.onnx photo.jpg
  ghm predict detector.onnx *.jpg --out annotated --threshold 0.3 --classes dog,cat
  ghm predict --url http://127.0.0.1:8000 photo.jpg
"""

_OPTIONS = ("threshold", "thresholds", "classes", "iou", "max_detections")
_ENVIRONMENT = "GHM_TOKEN"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm predict`."""
    parser.description = _DESCRIPTION
    parser.usage = "%(prog)s [options] (detector.onnx | --url URL) image [image ...]"
    add = parser.add_argument
    add("model", type=Path, metavar="detector", help="a .onnx file that ghm export wrote")
    images = add(
        "images",
        type=Path,
        nargs="+",
        default=[],
        metavar="image",
        help="JPEG, PNG, WebP, BMP, TIFF or GIF",
    )
    images.required = False  # with --url the first name is an image already
    add("--url", help="ask the service there, such as http://127.0.0.1:8000")
    add("--token", help=f"the service's, if it wants one (default: ${_ENVIRONMENT})")
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
        ValueError: A file, an image or an option does not fit, or the service refused; the message
            names it.
    """
    given = {n: getattr(arguments, n) for n in _OPTIONS if getattr(arguments, n) is not None}
    if arguments.url:
        _ask_service(arguments, given)
    else:
        _run_model(arguments, given)
    return 0


def _run_model(arguments: argparse.Namespace, given: dict[str, str]) -> None:
    from export.file import read_detector
    from service.core.cpus import available_cpus
    from service.core.errors import ProblemError
    from service.core.params import DetectOptions, read_options, resolve
    from service.engine.session import ModelError, ServedModel

    if not arguments.images:
        raise ValueError(f"no image is named after {arguments.model}")
    try:
        model = ServedModel(
            read_detector(arguments.model),
            provider=arguments.provider,
            threads=available_cpus(),
        )
        wanted = resolve(read_options(given.items(), DetectOptions), model.card)
        for path in arguments.images:
            image, answer = _predict_one(model, wanted, path)
            _show(path, answer, arguments, image)
    except (ProblemError, ModelError) as error:
        raise ValueError(str(error)) from error


def _ask_service(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    from service.client import Client, ServiceError

    if "thresholds" in given:
        given["thresholds"] = _read_thresholds(given["thresholds"])
    token = arguments.token or os.environ.get(_ENVIRONMENT) or None
    with Client(arguments.url, token) as client:
        for path in [arguments.model, *arguments.images]:
            try:
                result = client.detect(path, **given)
            except ServiceError as error:
                raise ValueError(f"{path}: {error.detail}") from error
            _show(path, result.to_dict(), arguments)


def _read_thresholds(text: str) -> dict[str, Any]:
    try:
        thresholds = json.loads(text)
    except ValueError as error:
        raise ValueError(f"thresholds is {text!r}: {error}") from error
    if not isinstance(thresholds, dict):
        raise ValueError(f"thresholds is {text!r}: it must be a JSON object")
    return thresholds


def _predict_one(
    model: ServedModel, wanted: DetectionParams, path: Path
) -> tuple[Image.Image, dict[str, Any]]:
    from service.api.pipeline import image_answer
    from service.images.decode import prepare

    image = _decode(path)
    row, geometry = prepare(image, model.card)
    found = model.detect(row[None], wanted.class_thresholds, wanted.iou_threshold)[0]
    return image, image_answer(geometry, found, wanted, model.card)


def _decode(path: Path) -> Image.Image:
    from service.core.settings import MOST_PIXELS
    from service.images.decode import decode
    from service.images.headers.base import ImageError

    try:
        return decode(path.read_bytes(), MOST_PIXELS)
    except ImageError as error:
        raise ValueError(f"{path}: {error}") from error


def _show(
    path: Path,
    answer: dict[str, Any],
    arguments: argparse.Namespace,
    image: Image.Image | None = None,
) -> None:
    """Print an answer, and draw it where a folder for that is named."""
    if arguments.json:
        print(json.dumps({"source": str(path), **answer}))
    else:
        print(_table(path, answer["detections"]))
    if arguments.out:
        image = image or _decode(path)
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
