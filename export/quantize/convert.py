"""Smaller numbers for a detector's core: int8, calibrated on images, or float16.

What decodes boxes, compares scores and suppresses overlaps stays in float32, so a file takes and
answers what it did before, and its thresholds are as exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from onnx import ModelProto, compose
from onnxruntime.quantization import QDQQuantizer, QuantType
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.transformers.float16 import convert_float_to_float16

from export.quantize.calibrate import Image, observe_ranges
from export.quantize.core import Core, cut_out, find_core, name_nodes, products_an_output

# A first layer that sums fewer products (a 3x3 window of colours: 27) is faster in float32: integer
# kernels copy every window before they multiply it.
LEAST_PRODUCTS = 64
HALF_PREFIX = "float16/"


@dataclass(frozen=True)
class Int8Recipe:
    """How numbers become integers; what the defaults are worth is in `benchmarks/quantize.py`.

    Attributes:
        coverage: Per cent of an activation's values that its range holds, see `observe_ranges`. A
            few outliers cost every other value resolution; cutting off more than these costs more.
        weight_bits: 8, or 7: then no sum of two products leaves 16 bits, and processors without
            VNNI (or AMX) compute what those with it do.
        per_channel: Whether every channel of a weight has a scale of its own.
        float_last: Whether the layers that say classes and boxes stay in float32: slower, and
            closer to the checkpoint.
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
    """Let a detector's core compute with 8-bit integers (static QDQ, uint8 by int8).

    Args:
        model: A detector's graph, float32; it is not changed.
        images: Prepared images like those it will see, float32 `[3, H, W]`.
        recipe: How.

    Returns:
        The new graph: the same inputs, outputs and defaults. The same model and images give the
        same graph.

    Raises:
        ValueError: There are no images, or no layers with weights.
    """
    made, core = _copy(model)
    ranges = observe_ranges(made, core, images, recipe.coverage)
    chosen = [node.name for node in core.nodes if not _stays_float(node.name, made, core, recipe)]
    quantizer = QDQQuantizer(
        made,
        per_channel=recipe.per_channel,
        reduce_range=recipe.weight_bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=chosen,
        nodes_to_exclude=[],
        op_types_to_quantize=core.op_types,
        extra_options={},
    )
    quantizer.quantize_model()
    return _finished(quantizer.model.model, model)


def to_float16(model: ModelProto) -> ModelProto:
    """Let a detector's core compute in float16, where the hardware has it; the weights take half.

    Args:
        model: A detector's graph, float32; it is not changed.

    Returns:
        The new graph: the same inputs, outputs and defaults, float32.

    Raises:
        ValueError: There are no layers with weights.
    """
    made, core = _copy(model)
    # Cut out first: the converter would round what it finds beside the core, thresholds included.
    half = convert_float_to_float16(cut_out(made, core), keep_io_types=True).graph
    half = compose.add_prefix_graph(
        half, HALF_PREFIX, rename_inputs=False, rename_outputs=False, rename_value_infos=False
    )
    own = {node.name for node in core.nodes}
    rest = [node for node in made.graph.node if node.name not in own]
    made.graph.ClearField("node")
    made.graph.node.extend([*half.node, *rest])
    made.graph.initializer.extend(half.initializer)
    return _finished(made, model)


def _copy(model: ModelProto) -> tuple[ModelProto, Core]:
    made = ModelProto()
    made.CopyFrom(model)
    name_nodes(made.graph)
    return made, find_core(made.graph)


def _stays_float(name: str, model: ModelProto, core: Core, recipe: Int8Recipe) -> bool:
    """Whether a node of the core is left as it is."""
    if recipe.float_last and name in {node.name for node in core.last}:
        return True
    little = (n.name for n in core.first if products_an_output(n, model.graph) < LEAST_PRODUCTS)
    return name in little


def _finished(made: ModelProto, original: ModelProto) -> ModelProto:
    """Put in order what the tools leave behind, and sign it as the original is."""
    tidy = ONNXModel(made)
    tidy.clean_initializers()
    tidy.topological_sort()
    made.graph.ClearField("value_info")  # of types that are no longer true
    made.producer_name, made.producer_version = original.producer_name, original.producer_version
    return made
