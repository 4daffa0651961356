"""What the protocol's routes take and answer, for OpenAPI.

The routes write their JSON themselves; a test holds it to these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Parameters = dict[str, bool | int | float | str]
Datatype = Literal["FP32", "UINT8", "INT64"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ServerLive(_Strict):
    """The process lives."""

    live: Literal[True]


class ServerReady(_Strict):
    """Requests can be answered."""

    ready: Literal[True]


class ModelReady(_Strict):
    """Requests to this model can be answered."""

    name: str = Field(examples=["pets"])
    ready: Literal[True]


class ServerMetadata(_Strict):
    """What the service is, and which of the protocol's extensions it has."""

    name: str = Field(examples=["ghm-triton"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data"]])


class TensorMetadata(_Strict):
    """A tensor of a model; -1 stands for any size from 1."""

    name: str = Field(examples=["images"])
    datatype: Datatype
    shape: list[int] = Field(examples=[[-1, 3, 512, 512]])


class ModelMetadata(_Strict):
    """A model's tensors.

    `class_thresholds` and `iou_threshold` may be left out of a request: the file's own hold then.
    """

    name: str = Field(examples=["pets"])
    versions: list[str] = Field(examples=[["1"]])
    platform: str = Field(examples=["onnxruntime_onnx"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfiguredTensor(_Strict):
    """A tensor of a model, without the batch."""

    name: str = Field(examples=["boxes"])
    data_type: Literal["TYPE_FP32", "TYPE_UINT8", "TYPE_INT64"]
    dims: list[int] = Field(examples=[[100, 4]])


class ConfiguredInput(ConfiguredTensor):
    """An input. Those that are optional hold for a whole request and are sent once."""

    format: Literal["FORMAT_NONE", "FORMAT_NCHW", "FORMAT_NHWC"]
    optional: bool


class ModelConfig(_Strict):
    """A model's configuration, in the form of Triton Inference Server's."""

    name: str = Field(examples=["pets"])
    platform: str
    backend: str
    version_policy: dict[str, Any]
    max_batch_size: int
    input: list[ConfiguredInput]
    output: list[ConfiguredTensor]
    instance_group: list[dict[str, Any]]
    default_model_filename: str
    model_transaction_policy: dict[str, bool]
    dynamic_batching: dict[str, Any] | None = Field(
        default=None, description="Only where images of several requests share an inference"
    )


class InputTensor(BaseModel):
    """An input: its numbers in `data`, or behind the JSON, or nowhere else."""

    name: Literal["images", "class_thresholds", "iou_threshold"]
    datatype: Literal["FP32", "UINT8"]
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=4)
    parameters: Parameters | None = Field(
        default=None, description="`binary_data_size`: how many of the bytes behind the JSON"
    )
    data: list[Any] | None = Field(
        default=None, description="Numbers in row-major order, flat or nested as the shape"
    )


class OutputRequest(BaseModel):
    """An output that is wanted."""

    name: Literal["boxes", "scores", "labels", "num_detections"]
    parameters: Parameters | None = Field(
        default=None, description="`binary_data`: whether as bytes behind the JSON"
    )


class InferenceRequest(BaseModel):
    """The JSON of a request. All outputs are answered where none are named."""

    id: str | None = Field(default=None, description="Echoed")
    parameters: Parameters | None = Field(
        default=None,
        description="`binary_data_output`: whether outputs come as bytes where they do not say;"
        " `timeout`: microseconds after which the answer is of no more use. Others are let be,"
        " except `sequence_id`: no state is kept.",
    )
    inputs: list[InputTensor] = Field(min_length=1, max_length=3)
    outputs: list[OutputRequest] | None = Field(default=None, max_length=4)


class OutputTensor(_Strict):
    """An output, its numbers flat in row-major order, or as bytes behind the JSON.

    Boxes are in pixels of `images`; images with fewer detections are padded with 0, and labels
    with -1.
    """

    name: str = Field(examples=["scores"])
    datatype: Datatype
    shape: list[Count] = Field(examples=[[1, 2]])
    data: list[float] | None = Field(default=None, examples=[[0.875, 0.5]])
    parameters: Parameters | None = Field(default=None, description="`binary_data_size`")


class InferenceAnswer(_Strict):
    """The JSON of an answer."""

    model_name: str = Field(examples=["pets"])
    model_version: str = Field(examples=["1"])
    id: str | None = Field(default=None, description="As the request had it")
    outputs: list[OutputTensor]


class DurationSum(_Strict):
    """How often, and how long in all."""

    count: Count
    ns: Count


class InferenceStatistics(_Strict):
    """Times of a model's requests; waiting for a turn is part of `compute_infer`."""

    success: DurationSum
    fail: DurationSum
    compute_input: DurationSum
    compute_infer: DurationSum
    compute_output: DurationSum


class ModelStatistics(_Strict):
    """What a model has answered through this protocol, in the process that tells it."""

    name: str = Field(examples=["pets"])
    version: str = Field(examples=["1"])
    last_inference: Count = Field(description="Milliseconds since 1970; 0 for never")
    inference_count: Count = Field(description="Images")
    execution_count: Count = Field(description="Requests")
    inference_stats: InferenceStatistics


class Statistics(_Strict):
    """The statistics of every model that was asked for."""

    model_stats: list[ModelStatistics]


class RepositoryModel(_Strict):
    """A model in the repository."""

    name: str = Field(examples=["pets"])
    version: str = Field(examples=["1"])
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str = Field(description="Why the file as it is does not serve; else empty")


class RepositoryQuery(BaseModel):
    """Which models to list."""

    ready: bool = Field(default=False, description="Only those that are ready")


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references, for places that FastAPI does not fill."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolved(definitions[part["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in part.items()}
        return [resolved(value) for value in part] if isinstance(part, list) else part

    found: dict[str, Any] = resolved(schema)
    return found
