"""`ghm train`, `ghm eval` and `ghm thresholds`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.compatibility import from_flags
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.options import Command, add_options, chosen, option

if TYPE_CHECKING:
    from ghm_triton.detection.data import DetectionDataset
    from ghm_triton.detection.evaluate import MeanAveragePrecision

IN_OUT = Path()  # --tensorboard without a folder


@dataclass(frozen=True)
class _Train:
    out: Path = option(help="folder for checkpoint.pt and metrics.jsonl")
    resume: bool = option(False, "continue from OUT/checkpoint.pt, with its options")
    overwrite: bool = option(False, "replace the run that is in OUT")
    device: str = option("auto", "auto (a GPU where there is one), cpu or cuda")
    tensorboard: Path | None = option(
        None,
        "also write losses, densities, positives and AP for TensorBoard, by default to"
        " OUT/tensorboard; repeat it with --resume",
        metavar="DIR",
        nargs="?",
        const=IN_OUT,
    )


@dataclass(frozen=True)
class _Eval:
    checkpoint: Path = option(help="checkpoint.pt of a training run", flag="checkpoint")
    data: str | None = option(None, "data set", shown="the one it was trained on")
    split: str = option("test", "split to evaluate on")
    device: str = option("auto", "auto, cpu or cuda")
    json: bool = option(False, "print JSON instead of a table")


@dataclass(frozen=True)
class _Thresholds:
    checkpoint: Path = option(help="checkpoint.pt of a training run", flag="checkpoint")
    policy: str = option("f1", "how to choose")
    plot: Path | None = option(
        None, "also draw score histograms with the thresholds", metavar="PNG"
    )
    json: bool = option(False, "print JSON instead of a table")


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm train`."""
    parser.description = """\
Train a detector and count the statistics that its thresholds are derived from.

examples:
  ghm train --out runs/digits
  ghm train --out runs/cells --data voc:path/to/BCCD --image-size 256x320 --hflip 0.5 --vflip 0.5
  ghm train --out runs/cells --resume
  ghm train --out runs/regions --detector faster-rcnn --cls-loss ce --reg-loss sl1
  torchrun --nproc-per-node 4 -m ghm_triton.cli train --out runs/coco --data coco:path/to/coco \\
      --backbone resnet50 --channels 256 --image-size 800x1344"""
    add_options(parser, _Train, TrainOptions, DetectorConfig)


def run_train(arguments: argparse.Namespace) -> int:
    """Carry out `ghm train`."""
    command = _Train(**chosen(arguments, _Train))
    flags = chosen(arguments, TrainOptions) | chosen(arguments, DetectorConfig)
    described = None if command.resume else from_flags(flags)  # before torch is imported

    from ghm_triton.detection.training.build import open_splits
    from ghm_triton.detection.training.checkpoint import CHECKPOINT, Checkpoint
    from ghm_triton.detection.training.loop import train

    path = command.out / CHECKPOINT
    if described is None:
        saved = Checkpoint.load(path)
        options, config = TrainOptions.of_run(saved.training), saved.config
        splits = open_splits(options, config.class_names)
    elif path.exists() and not command.overwrite:
        raise ValueError(
            f"{path} is there already: choose another --out, --resume that run, or --overwrite it"
        )
    else:
        options, detector = described
        splits = open_splits(options)
        config = DetectorConfig(class_names=splits.train.class_names, **detector)
    for dataset in splits:
        report_problems(dataset)
    board = command.tensorboard
    result = train(
        options,
        config,
        command.out,
        splits=splits,
        resume=command.resume,
        device=command.device,
        tensorboard=command.out / "tensorboard" if board is IN_OUT else board,
    )
    if result.held_out is not None:
        print(_summary(result.held_out, options.data, options.val_split))
        print(f"checkpoint: {result.checkpoint}")
    return 0


def configure_eval(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm eval`."""
    parser.description = """\
COCO average precision of a checkpoint on a held-out split.

example:
  ghm eval runs/digits/checkpoint.pt --split test"""
    add_options(parser, _Eval)


def run_eval(arguments: argparse.Namespace) -> int:
    """Carry out `ghm eval`."""
    from ghm_triton.detection.data import open_dataset
    from ghm_triton.detection.evaluate import detect, mean_average_precision, torch_predictor
    from ghm_triton.detection.models.postprocess import DeployedDetector
    from ghm_triton.detection.training.checkpoint import Checkpoint
    from ghm_triton.detection.training.distributed import world

    command = _Eval(**chosen(arguments, _Eval))
    saved = Checkpoint.load(command.checkpoint)
    data = command.data or saved.training["data"]
    names = saved.config.class_names
    dataset = open_dataset(data, command.split, class_names=names)
    report_problems(dataset)
    with world(command.device) as here:
        predict = torch_predictor(DeployedDetector(saved.detector()).to(here.device))
        result = mean_average_precision(names, list(detect(predict, saved.config, dataset)))
    print(json.dumps(result.to_dict()) if command.json else _summary(result, data, command.split))
    return 0


def configure_thresholds(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm thresholds`."""
    parser.description = """\
The threshold per class that a policy derives from a checkpoint's statistics, with the evidence:
positive anchors in training, held-out boxes, precision and recall at the threshold.

policies:
  prior          the class's probability at an anchor, counted in training
  f1             the score that maximises F1 on held-out images
  precision=0.9  the lowest score from which held-out precision is at least 0.9
  recall=0.95    the highest score that keeps a held-out recall of at least 0.95
  fixed=0.5      one number for every class

example:
  ghm thresholds runs/digits/checkpoint.pt --policy precision=0.9 --plot thresholds.png

Thresholds of a file that was exported before are set by hand with ghm thresholds set."""
    add_options(parser, _Thresholds)


def run_thresholds(arguments: argparse.Namespace) -> int:
    """Carry out `ghm thresholds`."""
    from ghm_triton.detection.training.checkpoint import Checkpoint
    from ghm_triton.evidence import ClassThresholds

    command = _Thresholds(**chosen(arguments, _Thresholds))
    statistics = Checkpoint.load(command.checkpoint).statistics
    thresholds = ClassThresholds.from_statistics(statistics, command.policy)
    print(json.dumps(asdict(thresholds)) if command.json else thresholds.table())
    if command.plot:
        from ghm_triton.detection.plots import plot_thresholds

        plot_thresholds(statistics, thresholds, command.plot)
        print(f"plot: {command.plot}", file=sys.stderr if command.json else sys.stdout)
    return 0


def report_problems(dataset: DetectionDataset) -> None:
    """Print every annotation that was skipped, with its file, to the standard error stream."""
    for problem in dataset.problems:
        print(f"skipped: {problem}", file=sys.stderr)


def _summary(result: MeanAveragePrecision, data: str, split: str) -> str:
    return (
        f"{result.table()}\n"
        f"AP {result.ap:.3f}  AP50 {result.ap50:.3f}  AP75 {result.ap75:.3f}"
        f"  on {result.images} images of {data}, split {split}"
    )


TRAIN = Command(
    "train", "train a detector with harmonized losses", configure_train, run_train, "train"
)
EVAL = Command("eval", "average precision of a checkpoint", configure_eval, run_eval, "train")
THRESHOLDS = Command(
    "thresholds",
    "the threshold per class, and why",
    configure_thresholds,
    run_thresholds,
    "train",
)
