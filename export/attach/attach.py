"""Thresholds, NMS and a card for an ONNX detector that was trained elsewhere.

The model's graph stays as it is; decoding, thresholds and NMS of this project's own detectors are
appended to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, compose, helper, numpy_helper
from onnx.version_converter import convert_version

from export.attach.card import AttachCard
from export.attach.outputs import (
    ROWS,
    AttachError,
    Boxes,
    Layout,
    OutputLayout,
    Postprocess,
    Scores,
    Unit,
    find_layout,
)
from export.bounds import parse_model
from export.card import INPUT, OUTPUTS, CardError, DetectorCard
from export.file import read_content, refuse_output, write_detector
from export.graph import IR_VERSION, OPSET, trace
from export.runtimes import FATAL, open_session
from ghm_triton.detection.training.checkpoint import sha256_of

PREFIX = "attached/"
PROBED = 2  # images: a batch of one does not show that a graph takes more


def attach(
    model_path: str | Path,
    card_path: str | Path,
    output_path: str | Path,
    *,
    layout: Layout | None = None,
    boxes: Boxes | None = None,
    unit: Unit | None = None,
    scores: Scores | None = None,
) -> tuple[DetectorCard, OutputLayout]:
    """Write an ONNX detector that was trained elsewhere as a file that keeps the contract.

    Args:
        model_path: An ONNX file with one input, float32 `[batch, 3, H, W]` with a dynamic batch,
            and outputs as `OutputLayout` describes them, with any names.
        card_path: JSON with what the file does not contain, see `AttachCard`.
        output_path: The file to write. An existing one is replaced once the new one is complete.
        layout: How boxes and scores are laid out; by the number of outputs if None.
        boxes: `cxcywh` for `yolo` and `xyxy` for `boxes+scores` if None.
        unit: `pixels` if None.
        scores: `probability` if None.

    Returns:
        The card in the new file, and the layout of the outputs.

    Raises:
        AttachError: The model has other inputs or outputs, has a fixed batch, or does not run; or
            its outputs for noise contradict a default.
        CardError: The card is not JSON, or not valid.
        ValueError: The output is the model or a folder, or onnx refuses the result.
        OSError: A file cannot be read or written.

    Example:
        >>> import json, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> theirs = '''<ir_version: 10, opset_import: ["": 18]>
        ... net (float[batch, 3, 32, 32] images) => (float[batch, 6, 512] rows) {
        ...     shape = Constant <value_ints = [0, 6, -1]> ()
        ...     rows = Reshape (images, shape)
        ... }'''
        >>> onnx.save(onnx.parser.parse_model(theirs), folder / "theirs.onnx")
        >>> facts = {"name": "pets", "class_names": ["cat", "dog"], "thresholds": 0.5}
        >>> _ = (folder / "card.json").write_text(json.dumps({**facts, "size": [32, 32]}))
        >>> paths = (folder / name for name in ("theirs.onnx", "card.json", "detector.onnx"))
        >>> card, layout = attach(*paths, unit="normalised")
        >>> layout
        OutputLayout(layout='yolo', boxes='cxcywh', unit='normalised', scores='probability')
    """
    model_path, output_path = Path(model_path), Path(output_path)
    refuse_output(output_path, model=model_path)
    description = AttachCard.read(card_path)
    card = description.detector_card(sha256_of(model_path))
    try:
        model = _with_contract_input(_load(model_path), card, description.color_order)
        outputs = _probe(model, card)
        complete, join, places = find_layout(outputs, card, layout, boxes, unit, scores)
        tail = trace(
            Postprocess(complete, card).eval(),
            {ROWS: (places, 4 + len(card.class_names))},
            card.class_thresholds,
            card.iou_threshold,
        )
        if (opset := _opset(model)) > OPSET:
            tail = convert_version(tail, opset)
        merged = _merge(model, join, tail)
        _probe(merged, card)
    except AttachError as error:
        raise AttachError(f"{model_path}: {error}") from error
    write_detector(output_path, merged, card)
    return card, complete


def _load(path: Path) -> ModelProto:
    try:
        model = parse_model(read_content(path))
        onnx.checker.check_model(model)
    except CardError as error:
        raise AttachError(str(error)) from error
    except Exception as error:  # exceptions of onnx and of protobuf have no common base
        raise AttachError(f"not an ONNX file that holds together: {error}") from error
    opset = _opset(model)
    if opset < OPSET:
        try:
            model = convert_version(model, OPSET)
        except Exception as error:  # RuntimeError or onnx's own ConvertError
            raise AttachError(
                f"opset {opset} cannot be raised to {OPSET}: {error}; export it with opset {OPSET}"
            ) from error
    return model


def _opset(model: ModelProto) -> int:
    return max((int(one.version) for one in model.opset_import if not one.domain), default=0)


def _with_contract_input(model: ModelProto, card: DetectorCard, color_order: str) -> ModelProto:
    """The model with the contract's input, and a prefix on all of its names."""
    constant = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constant]
    _check_input(inputs, card)
    made = compose.add_prefix(model, PREFIX)
    graph, frame = made.graph, card.preprocessing
    graph.ClearField("value_info")  # of sizes that the new input excludes
    graph.ClearField("input")
    shape: list[str | int | None] = ["batch", 3, frame.height, frame.width]
    graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape))
    entry = PREFIX + inputs[0].name
    first = helper.make_node("Identity", [INPUT], [entry])
    if color_order == "BGR":
        order = numpy_helper.from_array(np.array([2, 1, 0]), f"{PREFIX}bgr_order")
        graph.initializer.append(order)
        first = helper.make_node("Gather", [INPUT, order.name], [entry], axis=1)
    graph.node.insert(0, first)
    made.ir_version = max(IR_VERSION, made.ir_version)
    return made


def _check_input(inputs: list[ValueInfoProto], card: DetectorCard) -> None:
    if len(inputs) != 1:
        raise AttachError(f"{len(inputs)} inputs; there must be one, the images")
    tensor, name = inputs[0].type.tensor_type, inputs[0].name
    if tensor.elem_type != TensorProto.FLOAT:
        element = TensorProto.DataType.Name(tensor.elem_type)
        raise AttachError(f"input {name!r} is {element}, not FLOAT (float32)")
    sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
    if len(sizes) == 4 and sizes[0]:
        raise AttachError(
            f"its batch is fixed to {sizes[0]}, and a detector takes any; export it with a dynamic"
            " batch (Ultralytics: dynamic=True; torch: dynamic_shapes)"
        )
    expected = [3, card.preprocessing.height, card.preprocessing.width]
    if len(sizes) != 4 or any(a and a != b for a, b in zip(sizes[1:], expected, strict=True)):
        shape = ", ".join("any" if size is None else str(size) for size in sizes)
        raise AttachError(
            f"input {name!r} is [{shape}], and by the card [batch, {expected[0]}, {expected[1]},"
            f" {expected[2]}]"
        )


def _probe(model: ModelProto, card: DetectorCard) -> dict[str, npt.NDArray[Any]]:
    """Run a model on noise."""
    frame = card.preprocessing
    noise = np.random.default_rng(0).random((PROBED, 3, frame.height, frame.width))
    try:
        session = open_session(model.SerializeToString(), log_severity=FATAL)
        outputs = session.run(None, {INPUT: noise.astype(np.float32)})
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise AttachError(f"it does not run on a batch of {PROBED}: {error}") from error
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, outputs, strict=True))


def _merge(model: ModelProto, join: NodeProto, tail: ModelProto) -> ModelProto:
    """One graph of a model, a node from its outputs to `ROWS`, and a graph from there."""
    merged = ModelProto()
    merged.CopyFrom(model)
    merged.ClearField("metadata_props")
    merged.producer_name, merged.producer_version = tail.producer_name, tail.producer_version
    graph = merged.graph
    graph.name = tail.graph.name
    graph.node.extend([join, *tail.graph.node])
    graph.initializer.extend(tail.graph.initializer)
    graph.input.extend(value for value in tail.graph.input if value.name != ROWS)
    graph.ClearField("output")
    outputs = {value.name: value for value in tail.graph.output}
    graph.output.extend(outputs[name] for name in OUTPUTS)
    domains = {one.domain for one in merged.opset_import}
    merged.opset_import.extend(one for one in tail.opset_import if one.domain not in domains)
    merged.functions.extend(tail.functions)
    return merged
