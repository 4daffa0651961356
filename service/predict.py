"""`ghm predict`: the service's answers without a server, or from one."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghm_triton.options import Command, add_options, chosen, option
from ghm_triton.tables import printable

if TYPE_CHECKING:
    from PIL import Image

_DESCRIPTION = """Find objects in images with a detector's file and the thresholds in it.

The answers are those of ghm serve. Each detection has the threshold that it passed. With --url a
running service answers instead, and no detector is named.

examples:
  ghm predict detector.onnx photo.jpg
  ghm predict detector.onnx *.jpg --out annotated --threshold 0.3 --classes dog,cat
  ghm predict --url http://127.0.0.1:8000 photo.jpg
"""

_ENVIRONMENT = "GHM_TOKEN"


@dataclass
class DetectFlags:
    """Options of a detection, as text: `service.core.detections` checks them."""

    threshold: str | None = option(
        None, "one score for every class, in place of the file's", metavar="T"
    )
    thresholds: str | None = option(
        None, "scores per class, such as '{\"dog\": 0.7}'", metavar="JSON"
    )
    classes: str | None = option(None, "only these classes, comma-separated", metavar="NAMES")
    iou: str | None = option(
        None, "IoU from 0 to 1 above which NMS drops a box", shown="the file's", metavar="IOU"
    )
    max_detections: str | None = option(None, "most detections per image, the best first")


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
    add("--url", help="use the service there, such as http://127.0.0.1:8000")
    add("--token", help=f"the service's token, if it needs one (default: ${_ENVIRONMENT})")
    add("--out", type=Path, metavar="FOLDER", help="also draw the detections into PNGs there")
    add_options(parser, DetectFlags)
    add("--provider", choices=("auto", "cpu", "cuda"), default="auto", help="what runs the model")
    add("--json", action="store_true", help="print a JSON object per image instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Run `ghm predict`.

    Raises:
        ValueError: A file, an image or an option is not accepted, or the service refused; the
            message names it.
    """
    options = chosen(arguments, DetectFlags)
    if arguments.url:
        _ask_service(arguments, options)
    else:
        _run_model(arguments, options)
    return 0


def _run_model(arguments: argparse.Namespace, options: dict[str, str]) -> None:
    from export.file import read_detector
    from service.api.pipeline import image_answer
    from service.core.detections import DetectOptions, read_options, resolve
    from service.core.errors import ProblemError
    from service.core.settings import available_cpus
    from service.engine.session import ModelError, ServedModel
    from service.images import prepare

    if not arguments.images:
        raise ValueError(f"no image is named after {arguments.model}")
    try:
        file = read_detector(arguments.model)
        model = ServedModel(file, provider=arguments.provider, threads=available_cpus())
        params = resolve(read_options(options.items(), DetectOptions), model.card)
        for path in arguments.images:
            image = _decode(path)
            row, geometry = prepare(image, model.card)
            [detections] = model.detect(row[None], params.class_thresholds, params.iou_threshold)
            _show(path, image_answer(geometry, detections, params, model.card), arguments, image)
    except (ProblemError, ModelError) as error:
        raise ValueError(str(error)) from error


def _ask_service(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    from service.client import Client, ServiceError

    if "thresholds" in options:
        options["thresholds"] = _read_thresholds(options["thresholds"])
    token = arguments.token or os.environ.get(_ENVIRONMENT) or None
    with Client(arguments.url, token) as client:
        for path in [arguments.model, *arguments.images]:
            try:
                result = client.detect(path, **options)
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


def _decode(path: Path) -> Image.Image:
    from ghm_triton.images.decode import decode
    from ghm_triton.images.header import ImageError

    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise ValueError(f"{path}: {error}") from error


def _show(
    path: Path,
    answer: dict[str, Any],
    arguments: argparse.Namespace,
    image: Image.Image | None = None,
) -> None:
    """Print an answer, and draw it if a folder for that is named."""
    if arguments.json:
        print(json.dumps({"source": str(path), **answer}))
    else:
        print(_table(path, answer["detections"]))
    if arguments.out:
        image = image or _decode(path)
        print(f"drawn: {_draw(image, answer['detections'], arguments.out / path.name)}")


def _table(path: Path, detections: list[dict[str, Any]]) -> str:
    lines = [
        f"{printable(str(path))}: {len(detections)} detection{'' if len(detections) == 1 else 's'}"
    ]
    for one in detections:
        box = " ".join(f"{value:8.1f}" for value in one["box"])
        passed = f"{one['score']:.4f} >= {one['threshold']:.4f}"
        lines.append(f"  {printable(one['class']):<16}  {passed}  box {box}")
    return "\n".join(lines)


def _draw(image: Image.Image, detections: list[dict[str, Any]], path: Path) -> Path:
    from service.api.routes.detect import PNG, draw

    target = path.with_suffix(".png")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(draw(image, detections, PNG))
    return target


PREDICT = Command(
    "predict", "find objects in images with a detector's file", configure, run, "serve"
)
