"""`ghm demo`: every command from training to serving, on data that is built in."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from ghm_triton.options import Command


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ghm demo`."""
    parser.description = """\
Train on handwritten digits with GHM-C and GHM-R, print AP and thresholds, export, verify, start
the service, post a held-out image and draw the detections. Each command is printed before it runs.

example:
  ghm demo --out runs/demo"""
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), help="folder for results (runs/demo)")
    add("--data", default="digits", help="data set (default: digits, which is built in)")
    add("--steps", type=int, help="optimiser steps (default: those of ghm train)")
    add("--policy", default="f1", help="threshold policy (default: f1)")
    add("--image", type=int, default=0, help="index of the held-out image to post (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Run `ghm demo`."""
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
    print(f"""
Done in {time.perf_counter() - started:.0f} s. Results in {out}:
  detector.onnx        the detector with its thresholds and its card
  detections.png       the detections of the service
  gradient_norms.png   gradient norms before and after harmonizing
  thresholds.png       held-out scores and the threshold of every class""")
    return 0


def _ghm(*arguments: object) -> None:
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
    """Start `ghm serve` and post a held-out image: once for JSON, once for the drawn image."""
    from ghm_triton.detection.data import open_dataset

    posted = out / "held_out.png"
    open_dataset(data, "test")[index].image.save(posted)
    words = ["serve", str(onnx), "--port", "0"]
    print(f"\n$ ghm {' '.join(words)}", flush=True)
    server = subprocess.Popen(  # noqa: S603
        [sys.executable, "-u", "-m", "ghm_triton.cli", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"{_address(server.stdout)}/v1/detect"
        print(f"$ curl --data-binary @{posted} -H 'content-type: image/png' {url}")
        answer = json.loads(_post(url, posted))
        (out / "detections.png").write_bytes(_post(f"{url}?format=image", posted))
    finally:
        server.terminate()
        server.wait(timeout=30)
    rows = ",\n".join(f"    {json.dumps(detection)}" for detection in answer["detections"])
    text = json.dumps({**answer, "detections": []}, indent=2)
    print(text.replace('"detections": []', f'"detections": [\n{rows}\n  ]'))


def _address(output: IO[str] | None) -> str:
    """Read the address that the service prints once it is ready."""
    for line in output or ():
        print(line, end="", flush=True)
        for word in line.split():
            if word.startswith("http://"):
                return word.rstrip("/.,")
    raise ValueError("the service ended before it was ready")


def _post(url: str, image: Path) -> bytes:
    request = urllib.request.Request(url, image.read_bytes(), {"content-type": "image/png"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            content: bytes = response.read()
            return content
    except urllib.error.HTTPError as error:
        raise ValueError(f"the service answered {error.code}: {error.read().decode()}") from error


DEMO = Command("demo", "train, export, verify, serve and detect, in minutes", configure, run, "all")
