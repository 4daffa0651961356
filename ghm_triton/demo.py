"""`ghm demo`: the whole road with the commands a user would type, on data that is built in."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any

from ghm_triton.command import Command

STARTS = "http://"


def configure(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm demo`."""
    parser.description = """\
Train on handwritten digits with GHM-C and GHM-R, print AP and thresholds, export, verify, start
the service, post a held-out image and draw the answer. Every step is a command you could type;
it is printed before it runs.

example:
  ghm demo --out runs/demo"""
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for results (runs/demo)")
    add("--data", default="digits", help="what to learn (default: digits, which is built in)")
    add("--steps", type=int, help="optimiser steps (default: those of ghm train)")
    add("--policy", default="f1", help="threshold policy (default: f1)")
    add("--image", type=int, default=0, help="which held-out image to post (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Carry out `ghm demo`."""
    started = time.perf_counter()
    out: Path = arguments.out
    checkpoint, onnx = out / "checkpoint.pt", out / "detector.onnx"
    steps = [] if arguments.steps is None else ["--steps", str(arguments.steps)]
    _ghm("train", "--out", out, "--overwrite", "--data", arguments.data, *steps)
    _ghm("eval", checkpoint, "--split", "test")
    _ghm("thresholds", checkpoint, "--policy", arguments.policy, "--plot", out / "thresholds.png")
    _ghm("export", checkpoint, "--out", onnx, "--policy", arguments.policy)
    _ghm("verify", onnx, "--checkpoint", checkpoint, "--split", "test")
    _plot_gradients(checkpoint, out / "gradient_norms.png")
    _serve_one(onnx, out, arguments.data, arguments.image)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look into {out}:")
    for name, what in (
        ("detector.onnx", "the detector, its thresholds and its card"),
        ("detections.png", "what the service answered"),
        ("gradient_norms.png", "gradient norms before and after harmonizing"),
        ("thresholds.png", "held-out scores and the threshold of every class"),
    ):
        print(f"  {name:<20} {what}")
    return 0


def _ghm(*arguments: object) -> None:
    """Run one `ghm` command as a user would, and stop where it stops."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ ghm {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "ghm_triton.cli", *words], check=False).returncode  # noqa: S603
    if code:
        raise ValueError(f"`ghm {words[0]}` ended with exit code {code}")


def _plot_gradients(checkpoint: Path, path: Path) -> None:
    from ghm_triton.detection.data import open_dataset
    from ghm_triton.detection.plots import gradient_norms, plot_gradient_norms
    from ghm_triton.detection.training.checkpoint import Checkpoint

    saved = Checkpoint.load(checkpoint)
    dataset = open_dataset(saved.training["data"], saved.training["val_split"])
    norms = gradient_norms(saved.detector(), dataset, images=200)
    plot_gradient_norms(norms, saved.training["strength"], path)


def _serve_one(onnx: Path, out: Path, data: str, index: int) -> None:
    """Start `ghm serve`, post one held-out image to it, and draw the answer."""
    from ghm_triton.detection.data import open_dataset

    sample = open_dataset(data, "test")[index]
    posted = out / "held_out.png"
    sample.image.save(posted)
    words = ["serve", str(onnx), "--port", "0"]
    print(f"\n$ ghm {' '.join(words)}", flush=True)
    server = subprocess.Popen(  # noqa: S603
        [sys.executable, "-u", "-m", "ghm_triton.cli", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        url = _address(server.stdout)
        print(f"$ curl --data-binary @{posted} -H 'content-type: image/png' {url}/v1/detect")
        answer = _post(f"{url}/v1/detect", posted.read_bytes())
    finally:
        server.terminate()
        server.wait(timeout=30)
    print(_one_line_each(answer))
    _draw(answer, posted, out / "detections.png")


def _address(output: IO[str] | None) -> str:
    """The address that the service prints once it is ready."""
    for line in output or ():
        print(line, end="", flush=True)
        for word in line.split():
            if word.startswith(STARTS):
                return word.rstrip("/.,")
    raise ValueError("the service ended before it was ready")


def _post(url: str, image: bytes) -> dict[str, Any]:
    request = urllib.request.Request(url, image, {"content-type": "image/png"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise ValueError(f"the service answered {error.code}: {error.read().decode()}") from error


def _one_line_each(answer: dict[str, Any]) -> str:
    """The answer as JSON with a detection a line, which can be read."""
    rows = ",\n".join(f"    {json.dumps(found)}" for found in answer["detections"])
    rest = json.dumps({**answer, "detections": []}, indent=2)
    return rest.replace('"detections": []', f'"detections": [\n{rows}\n  ]')


def _draw(answer: dict[str, Any], image: Path, path: Path) -> None:
    from PIL import Image

    from ghm_triton.drawing import draw_detections

    shown = [
        (found["box"], f"{found['class']} {found['score']:.2f}", found["label"])
        for found in answer["detections"]
    ]
    draw_detections(Image.open(image).convert("RGB"), shown).save(path)


DEMO = Command("demo", "train, export, verify, serve and detect, in minutes", configure, run, "all")
