"""Thresholds, NMS and a card for a detector that was not trained here.

Any ONNX file that yields boxes and class scores becomes a file that keeps the contract: its graph
stays as it is, and what this project's own detectors end in is put behind it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, compose, helper, numpy_helper
from onnx.version_converter import convert_version
from torch import Tensor, nn

from export.attach.card import AttachCard
from export.card import INPUT, OUTPUTS, DetectorCard
from export.file import write_detector
from export.graph import IR_VERSION, OPSET, trace
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.detector import Predictions
from ghm_triton.detection.models.postprocess import DeployedDetector, Padded, clip_boxes
from ghm_triton.detection.training.checkpoint import sha256_of

Layout = Literal["yolo", "boxes+scores"]
Boxes = Literal["cxcywh", "xyxy"]
Unit = Literal["pixels", "normalised"]
Scores = Literal["probability", "logit"]

Answers = dict[str, npt.NDArray[Any]]

PREFIX = "attached/"
PROBED = 2  # images: a batch of one does not show that a graph takes more
ROUNDING = 1e-3  # that a runtime's softmax may leave [0, 1] by, many times over
SMALL = 2.0  # boxes that reach no further are hardly in pixels


class AttachError(ValueError):
    """The model is none that thresholds, NMS and a card can be attached to."""


@dataclass(frozen=True)
class Reading:
    """How a model's outputs are to be read.

    Attributes:
        layout: `yolo`: one output, `[B, 4 + C, A]` or `[B, A, 4 + C]`. `boxes+scores`: two,
            `[B, A, 4]` and `[B, A, C]`.
        boxes: Centre and size, or two corners.
        unit: Of the boxes: pixels of the input, or shares of its width and height.
        scores: Probabilities, or logits of sigmoids.
    """

    layout: Layout
    boxes: Boxes
    unit: Unit
    scores: Scores


def attach(
    model_path: str | Path,
    card_path: str | Path,
    output_path: str | Path,
    *,
    layout: Layout | None = None,
    boxes: Boxes | None = None,
    unit: Unit | None = None,
    scores: Scores | None = None,
) -> tuple[DetectorCard, Reading]:
    """Write a detector of somebody else's as a file that keeps the contract.

    Args:
        model_path: An ONNX file with one input, float32 `[batch, 3, H, W]` with a batch of any
            size, and outputs as `Reading` says, whatever their names.
        card_path: JSON that says what the file itself does not, see `AttachCard`.
        output_path: The file to write; one that is there is replaced once the new one is complete.
        layout: How outputs are laid out; by their shapes where None.
        boxes: `cxcywh` for `yolo` and `xyxy` for `boxes+scores` where None.
        unit: `pixels` where None.
        scores: `probability` where None.

    Returns:
        The card in the new file, and how the outputs are read.

    Raises:
        AttachError: The model has other inputs or outputs, fixes its batch, or does not run; or
            what it answers to noise contradicts what was not told but assumed.
        CardError: The card is not JSON, or not valid.
        ValueError: The output is the model or a folder, or onnx refuses the result.
        OSError: A file cannot be read or written.
    """
    model_path, output_path = Path(model_path), Path(output_path)
    if output_path.is_dir():
        raise ValueError(f"{output_path} is a folder; name a file, such as detector.onnx")
    if output_path.exists() and output_path.samefile(model_path):
        raise ValueError(f"{output_path} is the model; it would be overwritten")
    told = AttachCard.read(card_path)
    card = told.detector_card(sha256_of(model_path))
    try:
        model = _prepared(_load(model_path), card, told.color_order)
        answers = _probe(model, card)
        reading = _read_outputs(answers, card, layout, boxes, unit, scores)
        merged = _merge(model, _ending(_opset(model), answers, reading, card))
        _probe(merged, card)
    except AttachError as error:
        raise AttachError(f"{model_path}: {error}") from error
    write_detector(output_path, merged, card)
    return card, reading


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError:
        raise
    except Exception as error:  # onnx's and protobuf's share no class
        raise AttachError(f"not an ONNX file that holds together: {error}") from error
    return model


def _prepared(model: ModelProto, card: DetectorCard, color_order: str) -> ModelProto:
    """The model with the contract's input, names of its own, and an opset that ours can join."""
    opset = _opset(model)
    if opset < OPSET:
        try:
            model = convert_version(model, OPSET)
        except Exception as error:  # RuntimeError, and its own ConvertError
            raise AttachError(
                f"opset {opset} cannot be raised to {OPSET}: {error}; export it with opset {OPSET}"
            ) from error
    graph = model.graph
    constant = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constant]
    _check_input(inputs, card)
    made = compose.add_prefix(model, PREFIX)
    made.graph.ClearField("value_info")  # of sizes that the input's no longer allows
    frame = card.preprocessing
    images = helper.make_tensor_value_info(
        INPUT, TensorProto.FLOAT, ["batch", 3, frame.height, frame.width]
    )
    made.graph.ClearField("input")
    made.graph.input.append(images)
    entry = PREFIX + inputs[0].name
    if color_order == "BGR":
        order = numpy_helper.from_array(np.array([2, 1, 0]), f"{PREFIX}bgr_order")
        made.graph.initializer.append(order)
        first = helper.make_node("Gather", [INPUT, order.name], [entry], axis=1)
    else:
        first = helper.make_node("Identity", [INPUT], [entry])
    made.graph.node.insert(0, first)
    made.ir_version = max(IR_VERSION, made.ir_version)
    return made


def _check_input(inputs: list[ValueInfoProto], card: DetectorCard) -> None:
    if len(inputs) != 1:
        raise AttachError(f"{len(inputs)} inputs; there must be one, the images")
    tensor, name = inputs[0].type.tensor_type, inputs[0].name
    if tensor.elem_type != TensorProto.FLOAT:
        found = TensorProto.DataType.Name(tensor.elem_type)
        raise AttachError(f"input {name!r} is {found}, not FLOAT (float32)")
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    frame = card.preprocessing
    if len(sizes) == 4 and sizes[0] not in (None, 0):
        raise AttachError(
            f"its batch is fixed to {sizes[0]}, and a detector takes any; export it with a dynamic"
            " batch (Ultralytics: dynamic=True; torch: dynamic_shapes)"
        )
    wanted = (3, frame.height, frame.width)
    if len(sizes) != 4 or any(
        size not in (None, 0, right) for size, right in zip(sizes[1:], wanted, strict=True)
    ):
        shape = ", ".join("any" if size is None else str(size) for size in sizes)
        raise AttachError(
            f"input {name!r} is [{shape}], and by the card [batch, 3, {frame.height},"
            f" {frame.width}]"
        )


def _opset(model: ModelProto) -> int:
    return max((int(one.version) for one in model.opset_import if not one.domain), default=0)


def _probe(model: ModelProto, card: DetectorCard) -> Answers:
    """What a model answers to noise."""
    frame = card.preprocessing
    noise = np.random.default_rng(0).random((PROBED, 3, frame.height, frame.width))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say, its exceptions say
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        answers = session.run(None, {INPUT: noise.astype(np.float32)})
    except Exception as error:  # its errors share no class of their own
        raise AttachError(f"it does not run on a batch of {PROBED}: {error}") from error
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, answers, strict=True))


def _read_outputs(
    answers: Answers,
    card: DetectorCard,
    layout: Layout | None,
    boxes: Boxes | None,
    unit: Unit | None,
    scores: Scores | None,
) -> Reading:
    """How the outputs are to be read: as told, else by their shapes and by what is usual."""
    classes = len(card.class_names)
    found: Layout = layout or ("yolo" if len(answers) == 1 else "boxes+scores")
    reading = Reading(
        found,
        boxes or ("cxcywh" if found == "yolo" else "xyxy"),
        unit or "pixels",
        scores or "probability",
    )
    decode = Decode(reading, classes, (card.preprocessing.height, card.preprocessing.width))
    names = _outputs(answers, reading.layout, classes)
    places, values = decode.split([torch.from_numpy(answers[name]) for name in names])
    low, high = float(values.min()), float(values.max())
    if scores is None and not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        raise AttachError(
            f"its scores reach from {low:.3g} to {high:.3g}, which no probabilities do; if they"
            " are logits, pass --scores logit"
        )
    if unit is None and float(places.abs().max()) <= SMALL:
        raise AttachError(
            f"its boxes reach no further than {float(places.abs().max()):.3g}: pass --unit"
            " normalised if they are shares of the image, --unit pixels if they are so small"
        )
    return reading


def _outputs(answers: Answers, layout: Layout, classes: int) -> list[str]:
    """The names of the outputs that hold boxes and scores, or both."""
    shapes = {
        name: list(values.shape)
        for name, values in answers.items()
        if values.ndim == 3 and values.dtype == np.float32 and len(values) == PROBED
    }
    if layout == "yolo":
        both = [name for name, shape in shapes.items() if 4 + classes in shape[1:]]
        if both:
            return both[:1]
        wanted = f"one output float32 [batch, {4 + classes}, A]"
    else:
        # Where four classes make both alike, boxes come first, as they do by custom.
        boxes = [name for name, shape in shapes.items() if shape[2] == 4]
        scores = [name for name, shape in shapes.items() if shape[2] == classes]
        for one in boxes:
            for other in scores:
                if one != other and shapes[one][1] == shapes[other][1]:
                    return [one, other]
        wanted = f"outputs float32 [batch, A, 4] and [batch, A, {classes}]"
    shown = ", ".join(f"{x.dtype} {list(x.shape)}" for x in answers.values())
    raise AttachError(
        f"for a batch of {PROBED} its outputs are {shown}; {layout!r} for {classes} classes is"
        f" {wanted}"
    )


class Decode(nn.Module):
    """From a model's own outputs to boxes and scores as this project has them."""

    def __init__(self, reading: Reading, classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.reading, self.classes, self.image_size = reading, classes, image_size

    def split(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes `[B, A, 4]` and scores `[B, A, C]`, as the model means them."""
        if self.reading.layout == "boxes+scores":
            return outputs[0], outputs[1]
        (both,) = outputs
        if both.shape[1] == 4 + self.classes:
            both = both.transpose(1, 2)
        return both[..., :4], both[..., 4:]

    def forward(self, outputs: list[Tensor]) -> Predictions:
        """Corners in pixels, inside the image, and probabilities."""
        boxes, values = self.split(outputs)
        if self.reading.boxes == "cxcywh":
            centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
            boxes = torch.cat([centre - half, centre + half], dim=-1)
        if self.reading.unit == "normalised":
            height, width = self.image_size
            boxes = boxes * torch.tensor([width, height, width, height], dtype=boxes.dtype)
        boxes = clip_boxes(boxes, self.image_size).unsqueeze(2)
        scores = torch.sigmoid(values) if self.reading.scores == "logit" else values
        return Predictions(boxes, scores, values)


class Ending(DeployedDetector):
    """What this project's detectors end in, behind another's outputs."""

    def __init__(self, decode: Decode, card: DetectorCard) -> None:
        nn.Module.__init__(self)  # there is no detector of ours
        self.decode = decode
        limits = SimpleNamespace(candidates=card.candidates, max_detections=card.max_detections)
        self.config = cast(DetectorConfig, limits)  # all that `select` asks of it

    def forward(self, images: Tensor, class_thresholds: Tensor, iou_threshold: Tensor) -> Padded:
        """Detections from the model's one output, which takes the place of images here."""
        return self.select(self.decode([images]), class_thresholds, iou_threshold)


class EndingOfTwo(Ending):
    """The same behind a model of two outputs; the exporter wants each input by its name."""

    def forward(  # type: ignore[override]
        self, boxes: Tensor, scores: Tensor, class_thresholds: Tensor, iou_threshold: Tensor
    ) -> Padded:
        """Detections from boxes and scores."""
        return self.select(self.decode([boxes, scores]), class_thresholds, iou_threshold)


def _ending(opset: int, answers: Answers, reading: Reading, card: DetectorCard) -> ModelProto:
    frame, classes = card.preprocessing, len(card.class_names)
    decode = Decode(reading, classes, (frame.height, frame.width))
    names = _outputs(answers, reading.layout, classes)
    shapes = {name: answers[name].shape[1:] for name in names}
    kind = Ending if len(names) == 1 else EndingOfTwo
    ending = trace(kind(decode, card).eval(), shapes, card.class_thresholds, card.iou_threshold)
    return convert_version(ending, opset) if opset > OPSET else ending


def _merge(model: ModelProto, ending: ModelProto) -> ModelProto:
    """One graph of both: the model's outputs are the ending's inputs, by name."""
    merged = ModelProto()
    merged.CopyFrom(model)
    merged.ClearField("metadata_props")
    merged.producer_name, merged.producer_version = ending.producer_name, ending.producer_version
    graph = merged.graph
    graph.name = ending.graph.name
    graph.node.extend(ending.graph.node)
    graph.initializer.extend(ending.graph.initializer)
    joined = {value.name for value in model.graph.output}
    graph.input.extend(value for value in ending.graph.input if value.name not in joined)
    graph.ClearField("output")
    outputs = {value.name: value for value in ending.graph.output}
    graph.output.extend(outputs[name] for name in OUTPUTS)
    there = {one.domain for one in merged.opset_import}
    merged.opset_import.extend(one for one in ending.opset_import if one.domain not in there)
    merged.functions.extend(ending.functions)
    return merged
