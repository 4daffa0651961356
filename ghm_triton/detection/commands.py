"""`ghm train`, `ghm eval` and `ghm thresholds`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghm_triton.command import Command

if TYPE_CHECKING:
    from ghm_triton.detection.data import DetectionDataset
    from ghm_triton.detection.evaluate import MeanAveragePrecision
    from ghm_triton.detection.training.config import TrainOptions

SOFTMAX_LOSSES = ("ce", "ghm-softmax")  # as in `fits`, which loads torchvision's neighbours
UNDER_OUT = object()  # --tensorboard without a folder
DIGITS_FRAME = (128, 128)
FOLDER_FRAME = (320, 320)


def configure_train(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm train`."""
    parser.description = """\
Train a detector and count, while it learns, what its thresholds will come from.

examples:
  ghm train --out runs/digits
  ghm train --out runs/cells --data voc:path/to/BCCD --image-size 256x320 --hflip 0.5 --vflip 0.5
  ghm train --out runs/cells --resume
  ghm train --out runs/regions --detector faster-rcnn --cls-loss ce --reg-loss sl1
  torchrun --nproc-per-node 4 -m ghm_triton.cli train --out runs/coco --data coco:path/to/coco \\
      --backbone resnet50 --channels 256 --image-size 800x1344"""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoint.pt and metrics.jsonl")
    add("--resume", action="store_true", help="go on from OUT/checkpoint.pt, with its options")
    add("--device", default="auto", help="auto, cpu or cuda (default: a GPU where there is one)")
    add(
        "--tensorboard",
        type=Path,
        nargs="?",
        const=UNDER_OUT,
        metavar="DIR",
        help="also write losses, densities, positives and AP for TensorBoard (default: to"
        " OUT/tensorboard); say it again with --resume",
    )
    _add_data_options(parser.add_argument_group("data"))
    _add_detector_options(parser.add_argument_group("detector"))
    _add_loss_options(parser.add_argument_group("losses"))
    _add_adversarial_options(parser.add_argument_group("adversary"))
    _add_optimiser_options(parser.add_argument_group("optimiser"))


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--data", help="digits (default, no download), voc:FOLDER or coco:FOLDER")
    add("--train-split", help="default: train")
    add("--val-split", help="held-out split that thresholds are derived from (default: val)")
    add("--on-damage", choices=["skip", "refuse"], help="damaged annotations (default: skip)")
    add("--hflip", type=float, help="probability of mirroring left to right (default: 0)")
    add("--vflip", type=float, help="probability of mirroring upside down (default: 0)")
    add("--workers", type=int, help="processes that load images (default: 0, in this one)")


def _add_detector_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--detector",
        choices=["retinanet", "fcos", "faster-rcnn"],
        help="default: retinanet; fcos has no anchors, faster-rcnn looks twice",
    )
    add("--backbone", help="tiny (default), resnet18, resnet34, resnet50 or resnet101")
    add("--image-size", type=image_size, metavar="HxW", help="the network's frame, multiples of 32")
    add("--channels", type=int, help="width of tiny, of its pyramid and head (default: 48)")
    add("--head-convs", type=int, help="convolutions before each predictor, 1 to 4 (default: 2)")
    add("--anchor-scale", type=float, help="smallest anchor, in strides (default: 3)")
    add(
        "--assigner",
        choices=["iou", "cleanliness"],
        help="which anchors learn what: by thresholds of overlap (default), or the best of every"
        " box as far as they are clean; of faster-rcnn, its proposals'",
    )
    add("--prior", type=float, help="foreground probability at the start (default: 0.01)")
    add(
        "--init",
        metavar="prior=P|optimal",
        help="the same as --prior P; or the share of positives, counted over the data beforehand;"
        " of faster-rcnn, the anchors' that its proposals learn from",
    )
    add("--proposals", type=int, help="regions faster-rcnn looks into, an image (default: 300)")
    add(
        "--region-samples",
        type=int,
        help="and those it learns from, an image (default: 128), where they are sampled",
    )


def _add_loss_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--cls-loss",
        choices=["ghm", "focal", "ce", "ghm-softmax"],
        help="default: ghm (GHM-C); ce and ghm-softmax make faster-rcnn a softmax detector, the"
        " others sigmoids",
    )
    add(
        "--reg-loss",
        choices=["ghm", "sl1", "asl1", "iou", "giou"],
        help="default: ghm (GHM-R); sl1 and asl1 are smooth L1 and its authentic form; iou and"
        " giou are of whole boxes: for retinanet, and fcos has no other (default: giou)",
    )
    add(
        "--mining",
        choices=["none", "ohem", "s-ohem"],
        help="learn from hard examples only: places, and faster-rcnn's regions, of which one that"
        " sees the same as a harder one is left out (default: none); it suits ce",
    )
    add("--mining-keep", type=int, help="places or regions kept, an image (default: 64)")
    add(
        "--guided-loss",
        action=argparse.BooleanOptionalAction,
        help="scale the classification loss to the regression loss (default: with ghm where nothing"
        " is mined); of faster-rcnn, its regions'",
    )
    add(
        "--sampling",
        action=argparse.BooleanOptionalAction,
        help="whether faster-rcnn learns from samples of its anchors and regions (the default), or"
        " from all of them, under a guided loss of both stages",
    )
    add("--strength", type=float, help="of GHM-C, 0 (CE) to 1 (paper); default: 0.25")
    add("--strength-end", type=float, help="of GHM-C at the last step (default: constant)")
    add("--reg-strength", type=float, help="of GHM-R (default: 0.25)")
    add(
        "--reg-strength-end",
        type=float,
        help="of GHM-R after --steps batches with boxes, which alone are counted (default:"
        " constant)",
    )
    add("--bins", type=int, help="unit regions of GHM-C (default: 30)")
    add("--average", choices=["positives", "valid"], help="divisor of GHM-C and CE (positives)")
    add(
        "--cls-weight",
        type=float,
        help="multiplies the classification loss (default: 1); of guided losses, the balance",
    )
    add(
        "--reg-weight",
        type=float,
        help="multiplies the regression loss (default: 1, and 10 for ghm in retinanet); of guided"
        " losses both, as the classification follows it: balance those by --cls-weight",
    )


def _add_adversarial_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--adversarial",
        choices=["none", "asdn", "astn", "asdn+astn"],
        help="hides (asdn) or turns (astn) what faster-rcnn learns from (default: none)",
    )
    add(
        "--adversarial-start",
        type=float,
        help="share of the steps before that; asdn learns meanwhile (default: 0.25)",
    )


def _add_optimiser_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--steps", type=int, help="optimiser steps (default: 1000)")
    add("--batch-size", type=int, help="images a step, over all processes (default: 16)")
    add("--optimizer", choices=["adamw", "sgd"], help="default: adamw")
    add("--lr", type=float, help="peak rate; warm-up, then a cosine to zero (default: 3e-3)")
    add("--warmup", type=int, help="steps of warm-up (default: 50)")
    add("--weight-decay", type=float, help="default: 1e-4")
    add("--clip", type=float, help="largest gradient norm (default: 35)")
    add("--amp", choices=["none", "bf16", "fp16"], help="automatic mixed precision")
    add("--seed", type=int, help="of weights, batches and augmentation (default: 0)")
    add("--checkpoint-every", type=int, help="steps between checkpoints (default: 200)")


def run_train(arguments: argparse.Namespace) -> int:
    """Carry out `ghm train`."""
    from ghm_triton.detection.training.checkpoint import Checkpoint
    from ghm_triton.detection.training.config import TrainOptions
    from ghm_triton.detection.training.loop import CHECKPOINT, open_split, train

    given = _fitted({k: v for k, v in vars(arguments).items() if v is not None})
    if arguments.resume:
        saved = Checkpoint.load(arguments.out / CHECKPOINT)
        options, config = TrainOptions.of_run(saved.training), saved.config
    else:
        options = TrainOptions.from_dict(given)
        _require_fitting(options, given)
        dataset = open_split(options, options.train_split)
        report_problems(dataset)
        config = _config(given, dataset.class_names)
    board = arguments.tensorboard
    result = train(
        options,
        config,
        arguments.out,
        resume=arguments.resume,
        device=arguments.device,
        tensorboard=arguments.out / "tensorboard" if board is UNDER_OUT else board,
    )
    if result.held_out is not None:
        print(_summary(result.held_out, options.data, options.val_split))
        print(f"checkpoint: {result.checkpoint}")
    return 0


# Flags that mean nothing to a detector, and why.
UNFIT = {
    "retinanet": {
        "proposals": "it looks once, and proposes no regions",
        "region_samples": "it learns from every anchor",
        "sampling": "it learns from every anchor",
        "adversarial_start": "it looks once, and has no regions to make harder",
    },
    "fcos": {
        "anchor_scale": "it has no anchors",
        "proposals": "it looks once, and proposes no regions",
        "region_samples": "it learns from every point",
        "sampling": "it learns from every point",
        "adversarial_start": "it looks once, and has no regions to make harder",
    },
    "faster-rcnn": {},
}


def _fitted(given: dict[str, Any]) -> dict[str, Any]:
    """The flags given, and the defaults that follow from the detector."""
    architecture = given.get("detector", "retinanet")
    for name, reason in UNFIT[architecture].items():
        if name in given:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} does not fit --detector {architecture}: {reason}")
    defaults = {"architecture": architecture}
    if architecture == "fcos":
        defaults["reg_loss"] = "giou"
    if "prior" in given and "init" in given:
        raise ValueError(f"--prior {given['prior']} and --init {given['init']} exclude each other")
    if "mining_keep" in given and given.get("mining", "none") == "none":
        raise ValueError("--mining-keep means nothing without --mining")
    _require_regions_sampled(given)
    cls_loss = given.get("cls_loss")
    if architecture == "faster-rcnn" and cls_loss in SOFTMAX_LOSSES:
        defaults["classifier"] = "softmax"
        for name in ("prior", "init"):
            # `optimal` is of the proposals, whose objectness is a sigmoid.
            if given.get(name, "optimal") != "optimal":
                raise ValueError(
                    f"--{name} {given[name]} does not fit --cls-loss {cls_loss}: a softmax has no"
                    " such bias"
                )
    return {**defaults, **given}


def _require_regions_sampled(given: dict[str, Any]) -> None:
    """Refuse a number of regions to sample where none are sampled."""
    mined = given.get("mining", "none") != "none"
    if "region_samples" in given and (mined or not given.get("sampling", True)):
        reason = (
            f"--mining {given['mining']}, which keeps --mining-keep of them all"
            if mined
            else "--no-sampling, which learns from them all"
        )
        raise ValueError(f"--region-samples means nothing with {reason}")


def _require_fitting(options: TrainOptions, given: dict[str, Any]) -> None:
    """Refuse what the detector cannot learn by before any data is opened."""
    from ghm_triton.detection.training.compatibility import require_fitting

    classifier, assigner = given.get("classifier", "sigmoid"), given.get("assigner", "iou")
    require_fitting(options, given["architecture"], classifier, assigner)


def _config(given: dict[str, Any], class_names: tuple[str, ...]) -> Any:
    from dataclasses import fields

    from ghm_triton.detection.models.config import DetectorConfig

    digits = str(given.get("data", "digits")).partition(":")[0] == "digits"
    frame = given.get("image_size", DIGITS_FRAME if digits else FOLDER_FRAME)
    names = {field.name for field in fields(DetectorConfig)} - {"class_names", "image_size"}
    chosen = {name: given[name] for name in given.keys() & names}
    return DetectorConfig(class_names=class_names, image_size=frame, **chosen)


def configure_eval(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm eval`."""
    parser.description = """\
COCO average precision of a checkpoint on a held-out split.

example:
  ghm eval runs/digits/checkpoint.pt --split test"""
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a training run")
    add("--data", help="data set (default: the one it was trained on)")
    add("--split", default="test", help="split to evaluate on (default: test)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", action="store_true", help="print JSON instead of a table")


def run_eval(arguments: argparse.Namespace) -> int:
    """Carry out `ghm eval`."""
    from dataclasses import asdict

    from ghm_triton.detection.data import open_dataset
    from ghm_triton.detection.evaluate import detect, mean_average_precision, torch_predictor
    from ghm_triton.detection.models.postprocess import DeployedDetector
    from ghm_triton.detection.training.checkpoint import Checkpoint
    from ghm_triton.detection.training.distributed import world

    saved = Checkpoint.load(arguments.checkpoint)
    data = arguments.data or saved.training["data"]
    names = saved.config.class_names
    dataset = open_dataset(data, arguments.split, class_names=names)
    report_problems(dataset)
    with world(arguments.device) as here:
        predict = torch_predictor(DeployedDetector(saved.detector()).to(here.device))
        result = mean_average_precision(names, list(detect(predict, saved.config, dataset)))
    if arguments.json:
        print(json.dumps(asdict(result)))
    else:
        print(_summary(result, data, arguments.split))
    return 0


def configure_thresholds(parser: argparse.ArgumentParser) -> None:
    """Describe `ghm thresholds`."""
    parser.description = """\
The threshold of every class that a policy derives from a checkpoint's statistics, with the
evidence: positive anchors in training, held-out boxes, precision and recall at the threshold.

policies:
  prior          the class's probability at an anchor, counted in training
  f1             the score that maximises F1 on held-out images
  precision=0.9  the lowest score from which held-out precision is at least 0.9
  recall=0.95    the highest score that keeps a held-out recall of at least 0.95
  fixed=0.5      one number for every class

example:
  ghm thresholds runs/digits/checkpoint.pt --policy precision=0.9 --plot thresholds.png

Thresholds of a file that was exported before are set by hand with ghm thresholds set."""
    add = parser.add_argument
    add("checkpoint", type=Path, help="checkpoint.pt of a training run")
    add("--policy", default="f1", help="how to choose (default: f1)")
    add("--plot", type=Path, metavar="PNG", help="also draw score histograms with the thresholds")
    add("--json", action="store_true", help="print JSON instead of a table")


def run_thresholds(arguments: argparse.Namespace) -> int:
    """Carry out `ghm thresholds`."""
    from dataclasses import asdict

    from ghm_triton.detection.training.checkpoint import Checkpoint
    from ghm_triton.evidence import ClassThresholds

    statistics = Checkpoint.load(arguments.checkpoint).statistics
    thresholds = ClassThresholds.from_statistics(statistics, arguments.policy)
    if arguments.json:
        print(json.dumps(asdict(thresholds)))
    else:
        print(thresholds.table())
    if arguments.plot:
        from ghm_triton.detection.plots import plot_thresholds

        plot_thresholds(statistics, thresholds, arguments.plot)
        print(f"plot: {arguments.plot}")
    return 0


def image_size(text: str) -> tuple[int, int]:
    """`256x320` as `(256, 320)`, height first."""
    sides = re.fullmatch(r"(\d+)x(\d+)", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 256x320, got {text!r}")
    return int(sides[1]), int(sides[2])


def report_problems(dataset: DetectionDataset) -> None:
    """Print every annotation that was skipped, by file."""
    for problem in dataset.problems:
        print(f"skipped: {problem.source}: {problem.message}")


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
    "the threshold of every class, and why",
    configure_thresholds,
    run_thresholds,
    "train",
)
