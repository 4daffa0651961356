"""The service's answers, for OpenAPI and for clients that validate.

The detection routes write their JSON themselves, for speed; tests validate it against these models.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.card import DetectorCard

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Milliseconds = Annotated[float, Field(ge=0.0)]

# Fields that several answers have in common.
Label = Annotated[int, Field(ge=0, description="Index of the class in the model", examples=[0])]
ClassName = Annotated[str, Field(alias="class", description="Name of the class", examples=["dog"])]
ModelName = Annotated[str, Field(description="Name of the model", examples=["pets"])]
Version = Annotated[str, Field(description="Version of the model", examples=["1"])]
Sha256 = Annotated[str, Field(description="Digest of the file", examples=["9f86d081884c7d65" * 4])]
Policy = Annotated[str, Field(description="How the thresholds were chosen", examples=["f1"])]
ShippedThreshold = Annotated[Probability, Field(description="The file's own", examples=[0.5])]
Problem = Annotated[
    str | None,
    Field(description="Why the file as it is now does not serve; null where it does"),
]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class PreviewDetection(_Answer):
    """A detected object whose score reaches the floor."""

    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image that was sent, upright",
        examples=[[12.5, 40.0, 96.25, 131.0]],
    )
    score: Probability = Field(description="A float32", examples=[0.875])
    label: Label
    class_name: ClassName


class Detection(PreviewDetection):
    """A detected object."""

    threshold: Probability = Field(
        description="The threshold of the class in force for this request, which the score reaches."
        " A float32",
        examples=[0.5],
    )


class ImageSize(_Answer):
    """The size of an image as a viewer shows it, after EXIF's orientation."""

    width: int = Field(gt=0, description="Pixels", examples=[640])
    height: int = Field(gt=0, description="Pixels", examples=[480])


class Timings(_Answer):
    """The time of each stage, in milliseconds. The rest of `total_ms` was waiting."""

    read_ms: Milliseconds = Field(description="Receiving the body", examples=[0.5])
    decode_ms: Milliseconds = Field(description="Decoding and resizing", examples=[6.25])
    inference_ms: Milliseconds = Field(description="Running the model", examples=[41.0])
    total_ms: Milliseconds = Field(description="From the first byte read", examples=[48.5])


class ImageDetections(_Answer):
    """The detections in one image, in descending order of score."""

    image: ImageSize
    detections: list[Detection]


class DetectResponse(ImageDetections):
    """The answer for one image: a raw body, one `file` of a form, or one `image` of JSON."""

    model: ModelName
    version: Version
    timings: Timings


class ImageProblem(_Answer):
    """The reason why an image could not be read."""

    status: int = Field(description="Status of a request for it alone", examples=[400])
    title: str = Field(description="The status in words", examples=["Bad Request"])
    detail: str = Field(examples=["files[1] 'b.png': the PNG image is damaged: it is cut short"])


class ImageFailure(_Answer):
    """In place of detections, for an image that could not be read."""

    error: ImageProblem


class DetectManyResponse(_Answer):
    """The answer for `files` of a form or `images` of JSON: one result per image, in order.

    An image that cannot be read has an `error` in its place. Where none can be read, the request
    fails with the status of the first.
    """

    model: ModelName
    version: Version
    results: list[ImageDetections | ImageFailure]
    timings: Timings


class CocoResult(_Answer):
    """One object in the format of COCO results."""

    image_id: int | str = Field(
        description="From `image_ids`, or the index of the image in the request", examples=[0]
    )
    category_id: int = Field(ge=1, description="The label + 1: COCO counts from 1", examples=[1])
    bbox: tuple[float, float, float, float] = Field(
        description="x, y, width and height in pixels", examples=[[12.5, 40.0, 83.75, 91.0]]
    )
    score: Probability = Field(examples=[0.875])


class PreviewClass(_Answer):
    """The number of objects of a class that pass each threshold."""

    class_name: ClassName
    label: Label
    threshold: ShippedThreshold
    counts: list[int] = Field(
        description="For each of `steps`, the number of objects that reach it", examples=[[3, 1, 1]]
    )


class PreviewResponse(_Answer):
    """The objects in one image at every threshold."""

    model: ModelName
    version: Version
    image: ImageSize
    floor: Probability = Field(description="The score that all detections reach", examples=[0.25])
    truncated: bool = Field(
        description="Whether the model returned its largest number of objects, so that there may be"
        " more"
    )
    exact_above: Probability | None = Field(
        description="If truncated, the lowest score returned: counts at thresholds above it are"
        " exact. Null where all counts are",
        examples=[0.03125],
    )
    steps: list[Probability] = Field(
        description="Thresholds in ascending order", examples=[[0.25, 0.5, 0.75]]
    )
    classes: list[PreviewClass] = Field(description="In the order of labels")
    detections: list[PreviewDetection] = Field(
        description="All that reach the floor, in descending order of score"
    )
    timings: Timings


class _ServedModel(_Answer):
    name: ModelName
    version: Version
    sha256: Sha256
    loaded_at: Annotated[datetime | None, Field(description="Time at which it began to serve, UTC")]
    problem: Problem


class ModelSummary(_ServedModel):
    """A model in the list of models."""

    class_names: list[str] = Field(examples=[["dog", "cat"]])
    thresholds: dict[str, Probability] = Field(
        description="The file's threshold of each class", examples=[{"dog": 0.5, "cat": 0.25}]
    )
    threshold_policy: Policy


class ModelList(_Answer):
    """The models that the service has."""

    models: list[ModelSummary]


class ModelDetail(_ServedModel):
    """A model with its whole card."""

    providers: list[str] = Field(
        description="onnxruntime's execution providers", examples=[["CPUExecutionProvider"]]
    )
    threshold_policy: Policy
    card: DetectorCard


class Health(_Answer):
    """The process is alive."""

    status: Literal["alive"]


class ModelHealth(_Answer):
    """Whether one model answers."""

    name: ModelName
    version: Version
    ready: bool
    problem: Problem


class Readiness(_Answer):
    """The service answers requests."""

    status: Literal["ready"]
    models: list[ModelHealth]
    problems: list[str] = Field(description="Files that do not serve as they are, for operators")


class HistogramPair(_Answer):
    """Two histograms over the same bins, and the distance between them."""

    drift: Literal["unknown", "stable", "moderate", "major"] = Field(
        description="`stable` for a PSI below 0.1, `moderate` below 0.25, else `major`; `unknown`"
        " without one",
        examples=["stable"],
    )
    psi: float | None = Field(
        ge=0.0,
        description="Population stability index; null while there are too few detections",
        examples=[0.034],
    )
    psi_by_chance: float | None = Field(
        ge=0.0,
        description="Its expected value if nothing had changed, from the number of detections"
        " alone",
        examples=[0.02],
    )
    held_out: list[Annotated[int, Field(ge=0)]] = Field(
        description="Detections on held-out images, per bin", examples=[[120, 118, 131]]
    )
    live: list[Annotated[float, Field(ge=0.0)]] = Field(
        description="Recent detections, per bin; older ones count less",
        examples=[[98.5, 101.2, 133.9]],
    )


class ClassDriftAnswer(_Answer):
    """The scores of one class."""

    class_name: ClassName
    threshold: ShippedThreshold
    edges: list[Probability] = Field(
        description="Edges of the bins, one more than there are bins; empty where held-out images"
        " had too few detections of this class",
        examples=[[0.5, 0.75, 0.9, 1.0]],
    )
    scores: HistogramPair = Field(description="Over the bins of `edges`")


class DriftAnswer(_Answer):
    """The distance between recent detections and those that the thresholds were made from."""

    model: ModelName
    version: Version
    sha256: Sha256
    class_names: list[str] = Field(description="In the order of labels", examples=[["dog", "cat"]])
    mix: HistogramPair = Field(description="Detections per class: a bin each")
    classes: list[ClassDriftAnswer] = Field(description="In the order of labels")


class ProblemDetails(_Answer):
    """An error in the format of RFC 9457."""

    type: str = Field(description="`about:blank`: see the title", examples=["about:blank"])
    title: str = Field(description="The status in words", examples=["Unprocessable Entity"])
    status: int = Field(description="The HTTP status", examples=[422])
    detail: str = Field(
        description="What went wrong, naming the value at fault",
        examples=["classes: unknown class 'cow'; this model knows: dog, cat"],
    )
    error: str = Field(description="`detail` again, for v2 inference clients")
    request_id: str = Field(description="Also in `X-Request-ID` and in the service's log")
