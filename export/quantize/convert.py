"""int8, calibrated on images, or float16 for a detector's core.

Box decoding, score comparison and NMS stay in float32, so inputs and outputs keep their types and
thresholds stay exact.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, compose
from onnx.utils import Extractor
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.card import INPUT
from export.quantize.core import Core, cut_out, find_core, name_nodes, products_per_output

Image = npt.NDArray[np.float32]
BINS = 2048
# A first layer that sums fewer products (a 3x3 window of colours: 27) is faster in float32: integer
# kernels copy every window before they multiply it.
LEAST_PRODUCTS = 64
HALF_PREFIX = "float16/"


@dataclass(frozen=True)
class Int8Recipe:
    """Options of int8; `benchmarks/quantize.py` compares them.

    Attributes:
        coverage: Per cent of an activation's values within its range, see `observe_ranges`. A few
            outliers cost all other values resolution; cutting off more than these costs more.
        weight_bits: 8, or 7, where the sum of two products fits 16 bits, so that processors
            without VNNI (or AMX) compute the same as those with it.
        per_channel: Whether every channel of a weight has its own scale.
        float_last: Whether the predictors of classes and boxes stay in float32: slower, and closer
            to the checkpoint.
    """

    coverage: float = 99.999
    weight_bits: int = 7
    per_channel: bool = True
    float_last: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.coverage <= 100.0:
            raise ValueError(f"coverage must lie in (0, 100], got {self.coverage}")
        if self.weight_bits not in (7, 8):
            raise ValueError(f"weight_bits must be 7 or 8, got {self.weight_bits}")


def to_int8(
    model: ModelProto, images: Iterable[Image], recipe: Int8Recipe = Int8Recipe()
) -> ModelProto:
    """Quantize a detector's core to 8-bit integers (static QDQ, uint8 by int8).

    Args:
        model: A detector's graph, float32; it is not changed.
        images: Prepared images like those in use, float32 `[3, H, W]`.
        recipe: Options.

    Returns:
        The new graph, with the same inputs, outputs and defaults; deterministic.

    Raises:
        ValueError: There are no images, or no layers with weights.
    """
    made, core = _copy(model)
    ranges = observe_ranges(made, core, images, recipe.coverage)
    small = [n for n in core.first if products_per_output(n, made.graph) < LEAST_PRODUCTS]
    kept = {node.name for node in (*small, *(core.last if recipe.float_last else ()))}
    quantizer = QDQQuantizer(
        made,
        per_channel=recipe.per_channel,
        reduce_range=recipe.weight_bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=[node.name for node in core.nodes if node.name not in kept],
        nodes_to_exclude=[],
        op_types_to_quantize=core.op_types,
        extra_options={},
    )
    quantizer.quantize_model()
    return _finished(quantizer.model.model, model)


def to_float16(model: ModelProto) -> ModelProto:
    """Convert a detector's core to float16, which halves the weights; otherwise as `to_int8`."""
    made, core = _copy(model)
    # Cut out first, because the converter would round everything else too, thresholds included.
    half = convert_float_to_float16(cut_out(made, core), keep_io_types=True).graph
    half = compose.add_prefix_graph(
        half, HALF_PREFIX, rename_inputs=False, rename_outputs=False, rename_value_infos=False
    )
    inside = {node.name for node in core.nodes}
    rest = [node for node in made.graph.node if node.name not in inside]
    made.graph.ClearField("node")
    made.graph.node.extend([*half.node, *rest])
    made.graph.initializer.extend(half.initializer)
    return _finished(made, model)


def _copy(model: ModelProto) -> tuple[ModelProto, Core]:
    made = ModelProto()
    made.CopyFrom(model)
    name_nodes(made.graph)
    return made, find_core(made.graph)


def _finished(made: ModelProto, original: ModelProto) -> ModelProto:
    tidy = ONNXModel(made)
    tidy.clean_initializers()
    tidy.topological_sort()
    made.graph.ClearField("value_info")  # its types are outdated
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    return made


def observe_ranges(model: ModelProto, core: Core, images: Iterable[Image], coverage: float) -> Any:
    """Observe the range of every activation that the core reads or computes.

    Images are read one at a time. Half of the values that `coverage` leaves out, see `Int8Recipe`,
    are cut off at either end. Returns onnxruntime's `TensorsData`.
    """
    method = CalibrationMethod.MinMax if coverage == 100 else CalibrationMethod.Percentile
    options = {"num_bins": BINS, "percentile": coverage, "symmetric": False}
    with tempfile.TemporaryDirectory(prefix="ghm.calibrate.") as folder:
        path = Path(folder, "upstream.onnx")
        onnx.save_model(_upstream(model, core), path)
        calibrator = create_calibrator(
            path,
            core.op_types,
            augmented_model_path=str(path.with_name("observed.onnx")),
            calibrate_method=method,
            extra_options={} if coverage == 100 else options,
        )
        seen = 0
        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line per image
            for image in images:  # one at a time, because it keeps all activations in memory
                calibrator.collect_data(_One({INPUT: image[None]}))
                seen += 1
            if not seen:
                raise ValueError("there are no images to calibrate on")
            return calibrator.compute_data()


class _One(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: dict[str, Image]) -> None:
        self._left = [feeds]

    def get_next(self) -> dict[str, Image] | None:
        return self._left.pop() if self._left else None


def _upstream(model: ModelProto, core: Core) -> ModelProto:
    whole = onnx.shape_inference.infer_shapes(model)
    defaults = {tensor.name for tensor in whole.graph.initializer}
    needed = [value.name for value in whole.graph.input if value.name not in defaults]
    results = [name for node in core.nodes for name in node.output]
    part = Extractor(whole).extract_model(needed, results)
    constant = [value for value in part.graph.input if value.name in defaults]
    for value in constant:  # onnxruntime warns of inputs with defaults
        part.graph.input.remove(value)
    return part
