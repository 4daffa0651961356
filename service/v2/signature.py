"""A model's tensors, metadata and configuration in the protocol's terms, from the card."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from export.card import INPUT, IOU_INPUT, OUTPUTS, THRESHOLDS_INPUT, DetectorCard
from service.engine.session import CPU, ServedModel
from service.v2.tensors import TensorSpec

PLATFORM = "onnxruntime_onnx"  # the name that other inference servers use


@dataclass(frozen=True)
class Signature:
    """The tensors of a model.

    Attributes:
        inputs: `images`, and the thresholds that a request may set.
        outputs: In the contract's order.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, card: DetectorCard) -> Signature:
        """Return the signature of a detector with this card."""
        size = card.preprocessing
        if card.input == "uint8":
            images = TensorSpec(INPUT, "UINT8", (-1, -1, -1, 3))
        else:
            images = TensorSpec(INPUT, "FP32", (-1, 3, size.height, size.width))
        classes, most = len(card.class_names), card.max_detections
        boxes, scores, labels, number = OUTPUTS
        return cls(
            (
                images,
                TensorSpec(THRESHOLDS_INPUT, "FP32", (classes,), optional=True),
                TensorSpec(IOU_INPUT, "FP32", (1,), optional=True),
            ),
            (
                TensorSpec(boxes, "FP32", (-1, most, 4)),
                TensorSpec(scores, "FP32", (-1, most)),
                TensorSpec(labels, "INT64", (-1, most)),
                TensorSpec(number, "INT64", (-1,)),
            ),
        )


def metadata(model: ServedModel, versions: list[str]) -> dict[str, Any]:
    """Return a model's metadata; `versions` are all that are served under its name."""
    signature = Signature.of(model.card)
    inputs, outputs = (
        [{"name": s.name, "datatype": s.datatype, "shape": list(s.shape)} for s in specs]
        for specs in (signature.inputs, signature.outputs)
    )
    return {
        "name": model.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": outputs,
    }


def config(
    model: ServedModel, *, inferences: int, batch_size: int, batch_wait_ms: float
) -> dict[str, Any]:
    """Return a model's configuration in the form of Triton Inference Server's.

    Args:
        model: The model.
        inferences: Number of concurrent inferences.
        batch_size: The most images of one inference; 1 is no batching.
        batch_wait_ms: Time that an image waits for others.

    Returns:
        The configuration. `max_batch_size` is 0 and `dims` include the batch, since
        `class_thresholds` has none.
    """
    signature = Signature.of(model.card)
    layout = "FORMAT_NHWC" if model.card.input == "uint8" else "FORMAT_NCHW"
    configuration: dict[str, Any] = {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "onnxruntime",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [
            {
                **_configured(spec),
                "format": layout if spec.name == INPUT else "FORMAT_NONE",
                "optional": spec.optional,
            }
            for spec in signature.inputs
        ],
        "output": [_configured(spec) for spec in signature.outputs],
        "instance_group": [
            {
                "name": model.name,
                "kind": "KIND_CPU" if model.providers[0] == CPU else "KIND_GPU",
                "count": inferences,
            }
        ],
        "default_model_filename": "model.onnx",
        "model_transaction_policy": {"decoupled": False},
    }
    if batch_size > 1:
        configuration["dynamic_batching"] = {
            "preferred_batch_size": [batch_size],
            "max_queue_delay_microseconds": round(batch_wait_ms * 1000),
        }
    return configuration


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape)}
