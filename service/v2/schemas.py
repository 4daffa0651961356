"""The JSON of the protocol: requests, which are parsed by these models, and answers.

The routes write their answers themselves, for speed; tests validate them against these models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

Count = Annotated[int, Field(ge=0)]
Datatype = Literal["FP32", "UINT8", "INT64"]
Name = Annotated[str, Field(examples=["pets"])]
Version = Annotated[str, Field(examples=["1"])]
OutputParameterValues = dict[str, bool | int | float | str]


def _one_of(*values: str) -> Any:
    """A string whose allowed values are documented here and checked against the model."""
    return Field(json_schema_extra={"enum": list(values)})


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)  # unknown members are ignored


class InputParameters(_Request):
    """Parameters of an input; unknown ones are ignored."""

    binary_data_size: Count | None = Field(
        default=None, description="Number of the bytes behind the JSON that are this tensor's"
    )
    shared_memory_region: Any = Field(default=None, description="Refused")


class InputTensor(_Request):
    """An input, with its numbers in `data` or as bytes behind the JSON."""

    name: str = _one_of("images", "class_thresholds", "iou_threshold")
    datatype: str = _one_of("FP32", "UINT8")
    shape: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=4)
    parameters: InputParameters | None = None
    data: Annotated[Any, WithJsonSchema({"type": "array", "items": {}})] = Field(
        default=None, description="Numbers in row-major order, flat or nested as the shape"
    )


class OutputParameters(_Request):
    """Parameters of an output; unknown ones are ignored."""

    binary_data: bool | None = Field(
        default=None, description="Whether it comes as bytes behind the JSON"
    )
    classification: Any = Field(default=None, description="Refused")
    shared_memory_region: Any = Field(default=None, description="Refused")


class OutputRequest(_Request):
    """A requested output."""

    name: str = _one_of("boxes", "scores", "labels", "num_detections")
    parameters: OutputParameters | None = None


class RequestParameters(_Request):
    """Parameters of a request; unknown ones are ignored."""

    binary_data_output: bool = Field(
        default=False, description="Whether outputs come as bytes unless they choose themselves"
    )
    timeout: Count = Field(
        default=0, description="Microseconds after which the answer is no longer needed; 0: none"
    )
    sequence_id: Any = Field(default=None, description="Refused: no state is kept")


class InferenceRequest(_Request):
    """The JSON of a request. All outputs are answered where none are named."""

    id: str | None = Field(default=None, description="Echoed")
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=3)
    outputs: list[OutputRequest] | None = Field(default=None, max_length=4)


class RepositoryQuery(_Request):
    """Which models to list."""

    ready: bool = Field(default=False, description="Only those that are ready")


class LoadRequest(_Request):
    """Options of a load: none are supported."""

    parameters: Annotated[Any, WithJsonSchema({"type": "object"})] = Field(
        default=None, description="Refused: models are loaded from their files"
    )


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ServerLive(_Answer):
    """The process is alive."""

    live: Literal[True]


class ServerReady(_Answer):
    """Requests can be answered."""

    ready: Literal[True]


class ModelReady(_Answer):
    """Requests to this model can be answered."""

    name: Name
    ready: Literal[True]


class ServerMetadata(_Answer):
    """The service, and the protocol's extensions that it supports."""

    name: str = Field(examples=["ghm-triton"])
    version: str = Field(examples=["0.1.0"])
    extensions: list[str] = Field(examples=[["binary_tensor_data"]])


class TensorMetadata(_Answer):
    """A tensor of a model; -1 stands for any size from 1."""

    name: str = Field(examples=["images"])
    datatype: Datatype
    shape: list[int] = Field(examples=[[-1, 3, 512, 512]])


class ModelMetadata(_Answer):
    """A model's tensors.

    A request may leave out `class_thresholds` and `iou_threshold`: the file's own apply then.
    """

    name: Name
    versions: list[str] = Field(examples=[["1"]])
    platform: str = Field(examples=["onnxruntime_onnx"])
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfiguredTensor(_Answer):
    """A tensor of a model, without the batch."""

    name: str = Field(examples=["boxes"])
    data_type: Literal["TYPE_FP32", "TYPE_UINT8", "TYPE_INT64"]
    dims: list[int] = Field(examples=[[100, 4]])


class ConfiguredInput(ConfiguredTensor):
    """An input. Optional inputs apply to the whole request and are sent once."""

    format: Literal["FORMAT_NONE", "FORMAT_NCHW", "FORMAT_NHWC"]
    optional: bool


class ModelConfig(_Answer):
    """A model's configuration, in the form of Triton Inference Server's."""

    name: Name
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


class OutputTensor(_Answer):
    """An output, with its numbers flat in row-major order, or as bytes behind the JSON.

    Boxes are in pixels of `images`; images with fewer detections are padded with 0, and labels
    with -1.
    """

    name: str = Field(examples=["scores"])
    datatype: Datatype
    shape: list[Count] = Field(examples=[[1, 2]])
    data: list[float] | None = Field(default=None, examples=[[0.875, 0.5]])
    parameters: OutputParameterValues | None = Field(default=None, description="`binary_data_size`")


class InferenceAnswer(_Answer):
    """The JSON of an answer."""

    model_name: Name
    model_version: Version
    id: str | None = Field(default=None, description="That of the request")
    outputs: list[OutputTensor]


class DurationSum(_Answer):
    """A number of events and their total time."""

    count: Count
    ns: Count


class InferenceStatistics(_Answer):
    """Times of a model's requests."""

    success: DurationSum
    fail: DurationSum
    compute_input: DurationSum
    queue: DurationSum
    compute_infer: DurationSum
    compute_output: DurationSum
    cache_hit: DurationSum
    cache_miss: DurationSum


class ModelStatistics(_Answer):
    """The requests that a model has answered through this protocol, in this process."""

    name: Name
    version: Version
    last_inference: Count = Field(description="Milliseconds since 1970; 0 for never")
    inference_count: Count = Field(description="Images")
    execution_count: Count = Field(description="Requests")
    inference_stats: InferenceStatistics


class Statistics(_Answer):
    """The statistics of all models asked for."""

    model_stats: list[ModelStatistics]


class RepositoryModel(_Answer):
    """A model in the repository."""

    name: Name
    version: Version
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str = Field(description="Why the file as it is does not serve; else empty")


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema without references, for places that FastAPI does not fill."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolved(part: Any) -> Any:
        if isinstance(part, dict):
            if "$ref" in part:
                return resolved(definitions[part["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in part.items()}
        return [resolved(value) for value in part] if isinstance(part, list) else part

    result: dict[str, Any] = resolved(schema)
    return result
