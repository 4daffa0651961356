"""Thresholds set by hand: into the card with their evidence, and into the graph beside it.

For runtimes that cannot override an initializer, and for whoever wants another operating point to
travel with the file. Needs onnx and numpy, never torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from export.card import FORMAT_VERSION, IOU_INPUT, THRESHOLDS_INPUT, DetectorCard
from export.file import read_detector, refuse_output, set_default, write_detector
from ghm_triton.evidence import ClassStatistics, ClassThreshold, as_float32


def set_thresholds(
    card: DetectorCard,
    classes: Mapping[str, float] | None = None,
    *,
    every: float | None = None,
    iou_threshold: float | None = None,
) -> DetectorCard:
    """A card with thresholds set by hand.

    Their `source` becomes `manual`, and their precision and recall are those that the card's score
    histograms show at the new threshold. What is not set keeps its threshold and its source.

    Args:
        card: The card; it is not changed.
        classes: Thresholds in [0, 1] by class name; rounded to float32.
        every: The threshold of every class that `classes` leaves out; as they were where None.
        iou_threshold: The overlap that NMS allows, in [0, 1]; as it was where None.

    Raises:
        ValueError: Nothing is set, a class is unknown, or a number is NaN or not in [0, 1].
    """
    classes = classes or {}
    if not classes and every is None and iou_threshold is None:
        raise ValueError("nothing to set: name a class, a threshold for all, or an IoU threshold")
    unknown = [name for name in classes if name not in card.class_names]
    if unknown:
        raise ValueError(f"unknown class {unknown[0]!r}; known: {', '.join(card.class_names)}")
    for name, value in classes.items():
        _require_probability(f"the threshold of class {name!r}", value)
    if every is not None:
        _require_probability("the threshold of all classes", every)
    iou = card.iou_threshold
    if iou_threshold is not None:
        _require_probability("iou_threshold", iou_threshold)
        iou = as_float32(iou_threshold)
    chosen: dict[str, float | None] = dict.fromkeys(card.class_names, every)
    chosen.update(classes)
    entries = []
    for label, entry in enumerate(card.thresholds):
        score = chosen[entry.name]
        entries.append(entry if score is None else _by_hand(entry, label, score, card.statistics))
    changes = {"thresholds": entries, "iou_threshold": iou, "format_version": FORMAT_VERSION}
    return DetectorCard.model_validate({**dict(card), **changes})


def rewrite_thresholds(
    path: str | Path,
    output_path: str | Path,
    classes: Mapping[str, float] | None = None,
    *,
    every: float | None = None,
    iou_threshold: float | None = None,
) -> DetectorCard:
    """Write a detector's file anew with thresholds set by hand, in card and graph together.

    Args:
        path: A detector's file.
        output_path: Where to write; may be `path`. A file that is there is replaced only once the
            new one is complete.
        classes: As for `set_thresholds`.
        every: As for `set_thresholds`.
        iou_threshold: As for `set_thresholds`.

    Returns:
        The card in the new file.

    Raises:
        CardError: The file breaks its contract.
        ValueError: As for `set_thresholds`, or the output is a folder.
        OSError: A file cannot be read or written.
    """
    file, output_path = read_detector(path), Path(output_path)
    refuse_output(output_path)
    card = set_thresholds(file.card, classes, every=every, iou_threshold=iou_threshold)
    model = onnx.load_model_from_string(file.content)
    set_default(model, THRESHOLDS_INPUT, card.class_thresholds)
    set_default(model, IOU_INPUT, [card.iou_threshold])
    write_detector(output_path, model, card)
    return card


def _by_hand(
    entry: ClassThreshold, label: int, value: float, statistics: ClassStatistics
) -> ClassThreshold:
    threshold = as_float32(value)
    precision, recall = statistics.precision_recall_at(label, threshold)
    return replace(entry, threshold=threshold, source="manual", precision=precision, recall=recall)


def _require_probability(what: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:  # written so that NaN is outside
        raise ValueError(f"{what} must lie in [0, 1], got {value}")
