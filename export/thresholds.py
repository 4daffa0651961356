"""Thresholds set by hand, in the card with their evidence and in the graph.

For runtimes that cannot override an initializer, and for files that are to carry another operating
point. Needs onnx and numpy, not torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from export.card import FORMAT_VERSION, IOU_INPUT, THRESHOLDS_INPUT, DetectorCard
from export.file import read_detector, refuse_output, set_default, write_detector
from ghm_triton.evidence import as_float32
from ghm_triton.tables import printable


def set_thresholds(
    card: DetectorCard,
    classes: Mapping[str, float] | None = None,
    *,
    every: float | None = None,
    iou_threshold: float | None = None,
) -> DetectorCard:
    """Return a copy of a card with thresholds set by hand.

    Their `source` becomes `manual`, with the precision and recall of the card's score histograms at
    the new threshold. The other classes keep their threshold and its source.

    Args:
        card: The card; it is not changed.
        classes: Thresholds in [0, 1] by class name; rounded to float32.
        every: The threshold of every class that `classes` leaves out; None leaves them unchanged.
        iou_threshold: The IoU threshold of NMS, in [0, 1]; None leaves it unchanged.

    Raises:
        ValueError: Nothing is set, a class is unknown, or a number is NaN or not in [0, 1].
    """
    classes = classes or {}
    if not classes and every is None and iou_threshold is None:
        raise ValueError("nothing to set: name a class, a threshold for all, or an IoU threshold")
    unknown = [name for name in classes if name not in card.class_names]
    if unknown:
        known = printable(", ".join(card.class_names))
        raise ValueError(f"unknown class {unknown[0]!r}; known: {known}")
    for subject, value in (
        *((f"the threshold of class {name!r}", value) for name, value in classes.items()),
        ("the threshold of all classes", every),
        ("iou_threshold", iou_threshold),
    ):
        if value is not None and not 0.0 <= value <= 1.0:  # NaN is outside too
            raise ValueError(f"{subject} must lie in [0, 1], got {value}")
    entries = []
    for label, entry in enumerate(card.thresholds):
        score = classes.get(entry.name, every)
        if score is not None:
            threshold = as_float32(score)
            precision, recall = card.statistics.precision_recall_at(label, threshold)
            entry = replace(
                entry, threshold=threshold, source="manual", precision=precision, recall=recall
            )
        entries.append(entry)
    iou = card.iou_threshold if iou_threshold is None else as_float32(iou_threshold)
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
    """Write a copy of a detector file with thresholds set by hand, in card and graph together.

    Args:
        path: The file of a detector.
        output_path: Where to write; may be `path`. An existing file is replaced only once the new
            one is complete.
        classes: As in `set_thresholds`.
        every: As in `set_thresholds`.
        iou_threshold: As in `set_thresholds`.

    Returns:
        The card of the new file.

    Raises:
        CardError: The file is not a valid detector file.
        ValueError: As in `set_thresholds`, or the output is a folder.
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
