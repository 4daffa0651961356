"""What a detector's file says of itself, as a table that a person can read. Never imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from textwrap import wrap

import onnx
from onnx import ModelProto, helper

from export.card import DetectorCard, Preprocessing, QuantizationCard
from export.file import DetectorFile

LINE = 100
_INPUTS = {
    "float32": "images float32 [B, 3, {0.height}, {0.width}], which the caller prepares",
    "uint8": "images uint8 [B, height, width, 3] of any size, RGB; the graph prepares them",
}


def describe(file: DetectorFile) -> str:
    """The file, its card and its thresholds with their evidence, for a terminal.

    Args:
        file: A detector, as `export.file.read_detector` returns it.
    """
    card, model = file.card, onnx.load_model_from_string(file.content)
    facts = [*_file_facts(file, model), *_card_facts(card), *_training_facts(card)]
    if card.quantization:
        facts.append(("quantized", _quantization(card.quantization)))
    indent = 4 + max(len(name) for name, _ in facts)
    lines = [f"{file.path}: {card.name}"]
    for name, text in facts:
        lines += wrap(
            text,
            LINE,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", card.threshold_table()])


def _file_facts(file: DetectorFile, model: ModelProto) -> list[tuple[str, str]]:
    opsets = ", ".join(f"{entry.domain or 'opset'} {entry.version}" for entry in model.opset_import)
    return [
        ("file", f"{_megabytes(len(file.content))}, sha256 {file.sha256}"),
        ("format", f"ONNX IR {model.ir_version}, {opsets}; card {file.card.format_version}"),
        ("graph", f"{len(model.graph.node)} nodes, weights {_weights(model)}"),
    ]


def _card_facts(card: DetectorCard) -> list[tuple[str, str]]:
    frame = card.preprocessing
    return [
        ("network", f"{card.architecture}, backbone {card.backbone}"),
        ("input", _INPUTS[card.input].format(frame)),
        ("prepared", _preparation(frame)),
        ("normalised", f"(x / 255 - mean) / std; mean {_row(frame.mean)}, std {_row(frame.std)}"),
        (
            "output",
            f"boxes x1 y1 x2 y2 in pixels of `images`; at most {card.max_detections} an image",
        ),
        ("NMS", f"IoU {card.iou_threshold:.4g}, by class, over {card.candidates} candidates"),
    ]


def _preparation(frame: Preprocessing) -> str:
    return (
        f"{frame.color_order} letterboxed to {frame.height} x {frame.width} (height x width),"
        f" {frame.interpolation}, at the top left, rest {frame.pad_value}"
    )


def _quantization(made: QuantizationCard) -> str:
    calibrated = (
        f" (calibrated on {made.calibration_images} images of {made.calibration_data},"
        f" split {made.calibration_split})"
        if made.calibration_data
        else ""
    )
    return (
        f"{made.precision}{calibrated}: AP {made.ap_after:.3f} on {made.test_images} images of"
        f" {made.test_data}, split {made.test_split}; {made.ap_before:.3f} in float32"
    )


def _training_facts(card: DetectorCard) -> list[tuple[str, str]]:
    training, counted = card.training, card.statistics
    return [
        ("trained on", f"{training.data}, {training.steps} steps, seed {training.seed}"),
        ("losses", _pairs(training.losses)),
        ("versions", _pairs(training.versions)),
        ("checkpoint", f"sha256 {training.checkpoint_sha256}"),
        (
            "evidence",
            f"{counted.anchors:,} anchors and {sum(counted.positives):,} positives in training,"
            f" {sum(counted.ground_truths):,} held-out boxes",
        ),
    ]


def _weights(model: ModelProto) -> str:
    """Bytes of the initializers by their type, those that count."""
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        sizes[str(helper.tensor_dtype_to_np_dtype(tensor.data_type))] += tensor.ByteSize()
    large = [pair for pair in sizes.most_common() if pair[1] >= 0.01 * sizes.total()]
    return ", ".join(f"{name} {_megabytes(size)}" for name, size in large)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"


def _pairs(values: Mapping[str, object]) -> str:
    told = [f"{name} {value}" for name, value in sorted(values.items()) if value is not None]
    return ", ".join(told) or "not told"


def _row(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
