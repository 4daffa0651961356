"""Shared parts of the benchmarks that train: command-line options, training and evaluation."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ghm_triton.detection.data import open_dataset
from ghm_triton.detection.evaluate import detect, mean_average_precision, torch_predictor
from ghm_triton.detection.models.config import DetectorConfig, image_size
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.loop import train


def training_parser(description: str, results: Path) -> argparse.ArgumentParser:
    """Make a parser of the common options: data, network, steps, seeds and result file.

    Args:
        description: One line for `--help`.
        results: Default result file.
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
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    return parser


def trained(options: TrainOptions, **config: object) -> Checkpoint:
    """Train a detector of the data set's classes and return its checkpoint.

    Args:
        options: Options of training.
        **config: Fields of `DetectorConfig` except the classes.
    """
    names = open_dataset(options.data, options.train_split).class_names
    chosen = DetectorConfig(class_names=names, **config)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        return Checkpoint.load(train(options, chosen, Path(folder), progress=False).checkpoint)


def precision_on_test(saved: Checkpoint, data: str) -> dict[str, float]:
    """AP, AP50 and AP75 of a checkpoint on the test split of a data set."""
    names = saved.config.class_names
    predict = torch_predictor(DeployedDetector(saved.detector()))
    test = open_dataset(data, "test", class_names=names)
    result = mean_average_precision(names, list(detect(predict, saved.config, test)))
    return {"ap": result.ap, "ap50": result.ap50, "ap75": result.ap75}
