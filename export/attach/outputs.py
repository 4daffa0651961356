"""Output layouts of ONNX detectors, and their decoding into detections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from onnx import NodeProto, helper
from torch import Tensor, nn

from export.card import DetectorCard
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import DeployedDetector, Padded, clip_boxes

Layout = Literal["yolo", "boxes+scores"]
Boxes = Literal["cxcywh", "xyxy"]
Unit = Literal["pixels", "normalised"]
Scores = Literal["probability", "logit"]
Outputs = Mapping[str, npt.NDArray[Any]]

ROWS = "joined/rows"  # boxes and scores of a model, float32 [B, A, 4 + C]
ROUNDING = 1e-3  # many times what a runtime's softmax may leave [0, 1] by
SMALL = 2.0  # boxes with smaller coordinates are hardly in pixels


class AttachError(ValueError):
    """The model cannot be given thresholds, NMS and a card."""


@dataclass(frozen=True)
class OutputLayout:
    """The meaning of a model's outputs.

    Attributes:
        layout: `yolo`: one output, `[B, 4 + C, A]` or `[B, A, 4 + C]`. `boxes+scores`: two
            outputs, `[B, A, 4]` and `[B, A, C]`.
        boxes: Centre and size, or two corners.
        unit: Of the boxes: pixels of the input, or fractions of its width and height.
        scores: Probabilities, or logits of sigmoids.
    """

    layout: Layout
    boxes: Boxes
    unit: Unit
    scores: Scores


def find_layout(
    outputs: Outputs,
    card: DetectorCard,
    layout: Layout | None,
    boxes: Boxes | None,
    unit: Unit | None,
    scores: Scores | None,
) -> tuple[OutputLayout, NodeProto, int]:
    """Complete a layout by the shapes of a model's outputs and by what is usual.

    Args:
        outputs: The model's outputs by name, for a batch of noise.
        card: The model's card.
        layout: By the number of outputs if None.
        boxes: `cxcywh` for `yolo` and `xyxy` for `boxes+scores` if None.
        unit: `pixels` if None.
        scores: `probability` if None.

    Returns:
        The layout, a node from the outputs to `ROWS`, and its number of boxes `A`.

    Raises:
        AttachError: There are no such outputs, or their values contradict a default.
    """
    chosen: Layout = layout or ("yolo" if len(outputs) == 1 else "boxes+scores")
    complete = OutputLayout(
        chosen,
        boxes or ("cxcywh" if chosen == "yolo" else "xyxy"),
        unit or "pixels",
        scores or "probability",
    )
    node, rows = join_outputs(outputs, chosen, len(card.class_names))
    if layout is None and chosen == "yolo" and _is_end_to_end(rows):
        raise AttachError(
            "its rows look like x1 y1 x2 y2 score class, as NMS inside a model yields them: the"
            " last column has whole numbers only; export it without NMS (Ultralytics: nms=False,"
            " end2end=False), or pass --layout yolo if the columns are a box and two scores"
        )
    low, high = float(rows[..., 4:].min()), float(rows[..., 4:].max())
    if scores is None and not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN fails too
        raise AttachError(
            f"its scores reach from {low:.3g} to {high:.3g}, which no probabilities do; if they"
            " are logits, pass --scores logit"
        )
    reach = float(np.abs(rows[..., :4]).max())
    if unit is None and reach <= SMALL:
        raise AttachError(
            f"its boxes reach no further than {reach:.3g}: pass --unit normalised if they are"
            " fractions of the image, --unit pixels if they are so small"
        )
    return complete, node, rows.shape[1]


def _is_end_to_end(rows: npt.NDArray[np.float32]) -> bool:
    """Whether rows are two corners, a score and a class index, and not a box and two scores."""
    if rows.shape[2] != 6:
        return False
    ordered = (rows[..., :2] <= rows[..., 2:4]).all()
    return bool(ordered and (rows[..., 5] == rows[..., 5].round()).all())


def join_outputs(
    outputs: Outputs, layout: Layout, classes: int
) -> tuple[NodeProto, npt.NDArray[np.float32]]:
    """Find the outputs with boxes and scores, or with both, by their shapes.

    Returns:
        A node from these outputs to `ROWS`, `[B, A, 4 + C]`, and its output.
    """
    batch = len(next(iter(outputs.values())))
    shapes = {
        name: values.shape
        for name, values in outputs.items()
        if values.ndim == 3 and values.dtype == np.float32 and len(values) == batch
    }
    if layout == "yolo":
        for name, shape in shapes.items():
            if shape[1] == 4 + classes:
                node = helper.make_node("Transpose", [name], [ROWS], perm=[0, 2, 1])
                return node, outputs[name].transpose(0, 2, 1)
            if shape[2] == 4 + classes:
                return helper.make_node("Identity", [name], [ROWS]), outputs[name]
        expected = f"one output float32 [batch, {4 + classes}, A]"
    else:
        # With four classes both look alike; by convention, boxes come first.
        for one, (_, places, coordinates) in shapes.items():
            for other, shape in shapes.items():
                if one != other and coordinates == 4 and shape[1:] == (places, classes):
                    node = helper.make_node("Concat", [one, other], [ROWS], axis=2)
                    return node, np.concatenate([outputs[one], outputs[other]], axis=2)
        expected = f"outputs float32 [batch, A, 4] and [batch, A, {classes}]"
    shown = ", ".join(f"{values.dtype} {list(values.shape)}" for values in outputs.values())
    raise AttachError(
        f"for a batch of {batch} its outputs are {shown}; {layout!r} for {classes} classes is"
        f" {expected}"
    )


class Postprocess(DeployedDetector):
    """Decoding, thresholds and NMS behind a model's boxes and scores."""

    def __init__(self, layout: OutputLayout, card: DetectorCard) -> None:
        nn.Module.__init__(self)  # there is no detector inside
        self.layout = layout
        self.image_size = card.preprocessing.height, card.preprocessing.width
        limits = SimpleNamespace(candidates=card.candidates, max_detections=card.max_detections)
        self.config = cast(DetectorConfig, limits)  # `select` needs nothing else

    def forward(self, rows: Tensor, class_thresholds: Tensor, iou_threshold: Tensor) -> Padded:
        """Detect in `rows`, float32 `[B, A, 4 + C]`; otherwise as `DeployedDetector`."""
        boxes, values = rows[..., :4], rows[..., 4:]
        if self.layout.boxes == "cxcywh":
            centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
            boxes = torch.cat([centre - half, centre + half], dim=-1)
        if self.layout.unit == "normalised":
            height, width = self.image_size
            boxes = boxes * torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = clip_boxes(boxes, self.image_size).unsqueeze(2)
        scores = torch.sigmoid(values) if self.layout.scores == "logit" else values
        return self.select(Predictions(boxes, scores, values), class_thresholds, iou_threshold)
