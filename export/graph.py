"""Export of a detector's ONNX graph, with a dynamic batch and thresholds that callers override."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import ModelProto, numpy_helper
from onnxscript import opset18 as op

from export.card import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT
from ghm_triton.detection.models.detector import Detector
from ghm_triton.detection.models.postprocess import OUT, DeployedDetector

# By default, onnx writes newer versions than current runtimes accept.
OPSET = 18
IR_VERSION = 10
MAX_BATCH = 64
# Entries at OUT are excluded from NMS by any cut between it and the lowest logit.
RANK_CUT = OUT / 10


def build_graph(
    detector: Detector, class_thresholds: list[float], iou_threshold: float
) -> ModelProto:
    """Export a detector with its thresholds and NMS, see `trace`.

    Raises:
        ValueError: The number of thresholds is not the number of classes.
    """
    classes = detector.config.num_classes
    if len(class_thresholds) != classes:
        raise ValueError(f"{len(class_thresholds)} thresholds for {classes} classes")
    images = {INPUT: (3, *detector.config.image_size)}
    return trace(DeployedDetector(detector).eval(), images, class_thresholds, iou_threshold)


def trace(
    deployed: DeployedDetector,
    inputs: Mapping[str, tuple[int, ...]],
    class_thresholds: list[float],
    iou_threshold: float,
) -> ModelProto:
    """Export a module that ends in thresholds and NMS; sets it to evaluation mode.

    Args:
        deployed: A module of `inputs`, `class_thresholds` and `iou_threshold`.
        inputs: Shapes of float32 inputs by name, without the batch.
        class_thresholds: Default score per class that a detection must reach, `C` numbers.
        iou_threshold: Default overlap in [0, 1] that NMS allows.

    Returns:
        A model with the inputs, outputs and weights of the file's contract, but without a card
        and without information about the exporting machine.
    """
    model = _export(deployed, inputs, len(class_thresholds))
    _forget_origin(model)
    model.ir_version = IR_VERSION
    model.producer_name = "ghm-triton"
    model.producer_version = version("ghm-triton")
    model.graph.name = "detector"
    _set_default(model, THRESHOLDS_INPUT, class_thresholds)
    _set_default(model, IOU_INPUT, [iou_threshold])
    onnx.checker.check_model(model, full_check=True)
    return model


def _export(
    deployed: DeployedDetector, inputs: Mapping[str, tuple[int, ...]], classes: int
) -> ModelProto:
    # Two images, because torch.export specializes a batch of one to a constant.
    examples = tuple(torch.zeros(2, *shape) for shape in inputs.values())
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    shapes = tuple({0: batch} for _ in inputs)
    with _quietly():
        program = torch.onnx.export(
            deployed,
            (*examples, torch.full((classes,), 0.5), torch.full((1,), 0.5)),
            input_names=[*inputs, THRESHOLDS_INPUT, IOU_INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes=(*shapes, None, None),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            custom_translation_table={torch.ops.ghm.nms.default: _non_max_suppression},
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto


def _non_max_suppression(boxes: Any, ranks: Any, iou_threshold: Any, most: int) -> Any:
    """`ghm::nms` in ONNX."""
    limit: Any = op.Constant(value_ints=[most])
    cut: Any = op.Constant(value_floats=[RANK_CUT])
    return op.NonMaxSuppression(boxes, ranks, limit, iou_threshold, cut)


def _set_default(model: ModelProto, name: str, values: list[float]) -> None:
    tensor = numpy_helper.from_array(np.asarray(values, dtype=np.float32), name)
    model.graph.initializer.append(tensor)


def _forget_origin(message: Message) -> None:
    """Remove the exporter's debugging metadata, such as stack traces with paths."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            for part in [value] if isinstance(value, Message) else value:
                _forget_origin(part)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's warnings for its own developers."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            # Two inputs share their batch.
            warnings.filterwarnings("ignore", message="# The axis name: batch")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
