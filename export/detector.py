"""Export of a checkpoint as `detector.onnx`: graph, thresholds and card."""

from __future__ import annotations

import re
from pathlib import Path

from onnx import ModelProto

from export.card import DetectorCard, Preprocessing, TrainingCard
from export.file import refuse_output, write_detector
from export.graph import build_graph
from export.preprocess import accept_uint8
from ghm_triton.detection.training.checkpoint import Checkpoint, CheckpointError, sha256_of
from ghm_triton.evidence import ClassThresholds, as_float32

INPUT_TYPES = ("float32", "uint8", "both")
# The training options that define the loss.
LOSS_OPTIONS = (
    *("cls_loss", "reg_loss", "cls_weight", "reg_weight", "bins", "average"),
    *("strength", "strength_end", "reg_strength", "reg_strength_end"),
)
# Options of further methods, with the value that switches each off. The assigner is an option of
# the detector, all others are of the training.
METHOD_OPTIONS = {
    "mining": "none",
    "sampling": True,
    "init": "prior",
    "guided_loss": False,
    "adversarial": "none",
    "assigner": "iou",
}


def export_detector(
    checkpoint_path: str | Path,
    output_path: str | Path,
    *,
    policy: str = "f1",
    iou_threshold: float | None = None,
    name: str | None = None,
    input_type: str = "float32",
) -> DetectorCard:
    """Write a checkpoint's detector as one ONNX file with its thresholds and its card.

    The same checkpoint and arguments give the same bytes. An existing file is replaced once the
    new one is complete.

    Args:
        checkpoint_path: A checkpoint that training wrote.
        output_path: The `.onnx` file to write; its folder is created if it is missing.
        policy: How thresholds are derived from the checkpoint's statistics: `prior`, `f1`,
            `precision=P`, `recall=R` or `fixed=T`, see `ClassThresholds.from_statistics`.
        iou_threshold: The file's default overlap for NMS, in [0, 1]; the checkpoint's if None.
        name: Name of the detector; its architecture and backbone if None.
        input_type: `float32`: the file takes letterboxed and normalised images; `uint8`: it takes
            RGB images of any size, see `export.preprocess.accept_uint8`; `both`: `output_path`
            takes float32, and a second file beside it, see `output_paths`, takes uint8.

    Returns:
        The card in the file at `output_path`.

    Raises:
        CheckpointError: The checkpoint is missing, is damaged or lacks training options.
        ValueError: The policy, `iou_threshold`, `name` or `input_type` is not valid, or the output
            is the checkpoint or a folder.
        OSError: The file cannot be written.

    Example:
        ```python
        card = export_detector("runs/digits/checkpoint.pt", "detector.onnx", policy="f1")
        print(card.threshold_table())
        ```
    """
    checkpoint_path, output_path = Path(checkpoint_path), Path(output_path)
    check_outputs(output_path, input_type, checkpoint_path)
    checkpoint, digest = Checkpoint.load(checkpoint_path), sha256_of(checkpoint_path)
    card = make_card(checkpoint, digest, policy=policy, iou_threshold=iou_threshold, name=name)
    model = build_graph(checkpoint.detector(), card.class_thresholds, card.iou_threshold)
    return write_variants(output_path, input_type, model, card)


def output_paths(path: Path, input_type: str) -> list[Path]:
    """Return the files that an export to `path` writes.

    Example:
        >>> [path.name for path in output_paths(Path("runs/detector.onnx"), "both")]
        ['detector.onnx', 'detector.uint8.onnx']
    """
    second = path.with_name(f"{path.stem}.uint8{path.suffix}")
    return [path, second] if input_type == "both" else [path]


def write_variants(
    path: Path, input_type: str, model: ModelProto, card: DetectorCard
) -> DetectorCard:
    """Write a graph with float32 images as the files of an export; returns the first one's card."""
    variants = [] if input_type == "uint8" else [(model, card)]
    if input_type != "float32":
        variants.append(accept_uint8(model, card))
    for output, variant in zip(output_paths(path, input_type), variants, strict=True):
        write_detector(output, *variant)
    return variants[0][1]


def check_outputs(path: Path, input_type: str, checkpoint_path: Path) -> None:
    """Raise ValueError for an export that could not be written, before any work is done."""
    if input_type not in INPUT_TYPES:
        raise ValueError(f"input_type must be one of {', '.join(INPUT_TYPES)}, got {input_type!r}")
    for output in output_paths(path, input_type):
        refuse_output(output, checkpoint=checkpoint_path)


def make_card(
    checkpoint: Checkpoint,
    checkpoint_sha256: str,
    *,
    policy: str = "f1",
    iou_threshold: float | None = None,
    name: str | None = None,
) -> DetectorCard:
    """Return the card of a checkpoint's detector, with thresholds by a policy.

    Args:
        checkpoint: The checkpoint.
        checkpoint_sha256: The digest of its file, 64 hexadecimal digits.
        policy: As in `export_detector`.
        iou_threshold: As in `export_detector`.
        name: As in `export_detector`.

    Raises:
        CheckpointError: The checkpoint lacks training options, or its statistics are of other
            classes than its detector.
        ValueError: The policy, `iou_threshold` or `name` is not valid.
    """
    config, statistics = checkpoint.config, checkpoint.statistics
    if statistics.class_names != config.class_names:
        raise CheckpointError(
            f"{checkpoint.source}: the statistics are of {', '.join(statistics.class_names)}"
            f" and the detector of {', '.join(config.class_names)}"
        )
    iou = config.iou_threshold if iou_threshold is None else iou_threshold
    if not 0.0 <= iou <= 1.0:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold}")
    if name is not None and not name.strip():
        raise ValueError(f"name must not be blank, got {name!r}")
    thresholds = ClassThresholds.from_statistics(statistics, policy)
    height, width = config.image_size
    return DetectorCard(
        name=name or f"{config.architecture}-{config.backbone}",
        architecture=config.architecture,
        backbone=config.backbone,
        class_names=list(config.class_names),
        threshold_policy=policy,
        thresholds=list(thresholds),
        iou_threshold=as_float32(iou),
        candidates=config.candidates,
        max_detections=config.max_detections,
        preprocessing=Preprocessing(
            height=height, width=width, pad_value=config.pad_value, mean=config.mean, std=config.std
        ),
        statistics=statistics,
        training=_training(checkpoint, checkpoint_sha256),
    )


def _training(checkpoint: Checkpoint, checkpoint_sha256: str) -> TrainingCard:
    training = {**checkpoint.training, "assigner": checkpoint.config.assigner}
    methods = {  # older checkpoints lack these options
        option: training[option]
        for option, off in METHOD_OPTIONS.items()
        if training.get(option, off) != off
    }
    try:
        return TrainingCard(
            data=without_folders(training["data"]),
            losses={option: training[option] for option in LOSS_OPTIONS} | methods,
            seed=training["seed"],
            steps=training["step"],
            versions=training["versions"],
            checkpoint_sha256=checkpoint_sha256,
        )
    except KeyError as error:
        missing = error.args[0]
        raise CheckpointError(
            f"{checkpoint.source} does not say its training's {missing}"
        ) from error
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.source}: training cannot be used: {reason}") from error


def without_folders(data: str) -> str:
    """Remove folders from a data set's name in `--data` syntax; they mean nothing elsewhere.

    Example:
        >>> without_folders("voc:/home/someone/data/bccd")
        'voc:bccd'
        >>> without_folders("digits:noise=0.1")
        'digits:noise=0.1'
    """
    return re.sub(r"[^:,;=]*[/\\](?=[^:,;=/\\])", "", data)
