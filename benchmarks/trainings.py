"""The options that every benchmark has which trains: data, network, steps, seeds, results."""

from __future__ import annotations

import argparse
from pathlib import Path

from ghm_triton.detection.models.config import image_size


def training_parser(description: str, results: Path) -> argparse.ArgumentParser:
    """A parser of those options; a benchmark adds what it compares.

    Args:
        description: What it asks, in a line.
        results: Where its rows go unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--image-size", type=image_size, default=(128, 128), metavar="HxW")
    parser.add_argument("--channels", type=int, default=48)
    parser.add_argument("--flips", type=float, default=0.0, help="probability of either mirroring")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=results)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    return parser
