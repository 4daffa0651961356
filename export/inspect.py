"""A summary of a detector's file for a terminal. Never imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from textwrap import wrap

import onnx
from onnx import ModelProto, helper

from export.card import DetectorCard
from export.file import DetectorFile
from ghm_triton.tables import printable

LINE = 100


def describe(file: DetectorFile) -> str:
    """Format a file, its card, and its thresholds with their evidence for a terminal.

    Args:
        file: A detector, as `export.file.read_detector` returns it.
    """
    card, model = file.card, onnx.load_model_from_string(file.content)
    opsets = ", ".join(f"{entry.domain or 'opset'} {entry.version}" for entry in model.opset_import)
    facts = {
        "file": f"{_megabytes(len(file.content))}, sha256 {file.sha256}",
        "format": f"ONNX IR {model.ir_version}, {opsets}; card {card.format_version}",
        "graph": f"{len(model.graph.node)} nodes, weights {_weights(model)}",
        **_facts(card),
    }
    indent = 4 + max(map(len, facts))
    lines = [printable(f"{file.path}: {card.name}")]
    for name, text in facts.items():
        lines += wrap(
            printable(text),
            LINE,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join([*lines, "", card.threshold_table()])


def _facts(card: DetectorCard) -> dict[str, str]:
    frame, training, counted = card.preprocessing, card.training, card.statistics
    size = f"{frame.height} x {frame.width} (height x width)"
    inputs = {
        "float32": f"images float32 [B, 3, {frame.height}, {frame.width}], prepared by the caller",
        "uint8": "images uint8 [B, height, width, 3] of any size, RGB, prepared in the graph",
    }
    facts = {
        "network": f"{card.architecture}, backbone {card.backbone}",
        "input": inputs[card.input],
        "prepared": f"{frame.color_order} letterboxed to {size}, {frame.interpolation}, at the top"
        f" left, rest {frame.pad_value}",
        "normalised": f"(x / 255 - mean) / std; mean {_row(frame.mean)}, std {_row(frame.std)}",
        "output": f"boxes x1 y1 x2 y2 in pixels of `images`; at most {card.max_detections} per"
        " image",
        "NMS": f"IoU {card.iou_threshold:.4g}, per class, over {card.candidates} candidates",
        "trained on": f"{training.data}, {training.steps} steps, seed {training.seed}",
        "losses": _pairs(training.losses),
        "versions": _pairs(training.versions),
        "checkpoint": f"sha256 {training.checkpoint_sha256}",
        "evidence": f"{counted.anchors:,} anchors and {sum(counted.positives):,} positives in"
        f" training, {sum(counted.ground_truths):,} held-out boxes",
    }
    if made := card.quantization:
        calibrated = (
            f" (calibrated on {made.calibration_images} images of {made.calibration_data},"
            f" split {made.calibration_split})"
        )
        facts["quantized"] = (
            f"{made.precision}{calibrated if made.calibration_data else ''}: AP"
            f" {made.ap_after:.3f} on {made.test_images} images of {made.test_data}, split"
            f" {made.test_split}; {made.ap_before:.3f} in float32"
        )
    return facts


def _weights(model: ModelProto) -> str:
    """Bytes of the initializers by type, from 1 % on."""
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        sizes[str(helper.tensor_dtype_to_np_dtype(tensor.data_type))] += tensor.ByteSize()
    large = [pair for pair in sizes.most_common() if pair[1] >= 0.01 * sizes.total()]
    return ", ".join(f"{name} {_megabytes(size)}" for name, size in large)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"


def _pairs(values: Mapping[str, object]) -> str:
    known = [f"{name} {value}" for name, value in sorted(values.items()) if value is not None]
    return ", ".join(known) or "not told"


def _row(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
