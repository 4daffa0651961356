"""What the service answers, for OpenAPI and for clients that validate.

The detection route writes its JSON itself, for speed; a test holds it to these models.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from export.card import DetectorCard

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Milliseconds = Annotated[float, Field(ge=0.0)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Detection(_Answer):
    """One object."""

    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image that was sent, upright",
        examples=[[12.5, 40.0, 96.25, 131.0]],
    )
    score: Probability = Field(description="A float32", examples=[0.875])
    label: int = Field(ge=0, description="The class's place in the model's list", examples=[0])
    class_name: str = Field(alias="class", description="The class's name", examples=["dog"])
    threshold: Probability = Field(
        description="What the score had to reach: the threshold of this class in force for this"
        " request. A float32",
        examples=[0.5],
    )


class ImageSize(_Answer):
    """The size of an image as a viewer shows it, after EXIF's orientation."""

    width: int = Field(gt=0, description="Pixels", examples=[640])
    height: int = Field(gt=0, description="Pixels", examples=[480])


class Timings(_Answer):
    """Where the time went, in milliseconds. What `total_ms` has beyond the rest was waiting."""

    read_ms: Milliseconds = Field(description="Receiving the body", examples=[0.5])
    decode_ms: Milliseconds = Field(description="Decoding and resizing", examples=[6.25])
    inference_ms: Milliseconds = Field(description="Running the model", examples=[41.0])
    total_ms: Milliseconds = Field(description="From the first byte read", examples=[48.5])


class ImageDetections(_Answer):
    """What was found in one image, best first."""

    image: ImageSize
    detections: list[Detection]


class DetectResponse(ImageDetections):
    """The answer for one image: a raw body, one `file` of a form, or one `image` of JSON."""

    model: str = Field(description="The name of the model", examples=["pets"])
    version: str = Field(description="Its version", examples=["1"])
    timings: Timings


class ImageProblem(_Answer):
    """Why an image could not be read."""

    status: int = Field(description="What a request for it alone would get", examples=[400])
    title: str = Field(description="The status in words", examples=["Bad Request"])
    detail: str = Field(examples=["files[1] 'b.png': the PNG image is damaged: it is cut short"])


class ImageFailure(_Answer):
    """In place of detections, for an image that could not be read."""

    error: ImageProblem


class DetectManyResponse(_Answer):
    """The answer for `files` of a form or `images` of JSON: a result each, in their order.

    An image that cannot be read has an `error` in its place. Where none can be read, the request
    fails with the first one's status.
    """

    model: str = Field(description="The name of the model", examples=["pets"])
    version: str = Field(description="Its version", examples=["1"])
    results: list[ImageDetections | ImageFailure]
    timings: Timings


class CocoResult(_Answer):
    """One object, as COCO's tools read results."""

    image_id: int | str = Field(
        description="From `image_ids`, or the image's place in the request", examples=[0]
    )
    category_id: int = Field(ge=1, description="The label + 1: COCO counts from 1", examples=[1])
    bbox: tuple[float, float, float, float] = Field(
        description="x, y, width and height in pixels", examples=[[12.5, 40.0, 83.75, 91.0]]
    )
    score: Probability = Field(examples=[0.875])


class PreviewDetection(_Answer):
    """One object that reaches the floor."""

    box: tuple[float, float, float, float] = Field(
        description="x1, y1, x2, y2 in pixels of the image, upright",
        examples=[[12.5, 40.0, 96.25, 131.0]],
    )
    score: Probability = Field(description="A float32", examples=[0.875])
    label: int = Field(ge=0, description="The class's place in the model's list", examples=[0])
    class_name: str = Field(alias="class", description="The class's name", examples=["dog"])


class PreviewClass(_Answer):
    """How many objects of a class would pass at each threshold."""

    class_name: str = Field(alias="class", description="The class's name", examples=["dog"])
    label: int = Field(ge=0, description="The class's place in the model's list", examples=[0])
    threshold: Probability = Field(description="The file's own", examples=[0.5])
    counts: list[int] = Field(
        description="For each of `steps`, how many objects reach it", examples=[[3, 1, 1]]
    )


class PreviewResponse(_Answer):
    """What would be found in one image at every threshold."""

    model: str = Field(description="The name of the model", examples=["pets"])
    version: str = Field(description="Its version", examples=["1"])
    image: ImageSize
    floor: Probability = Field(description="The score that all here reach", examples=[0.25])
    truncated: bool = Field(
        description="Whether the model gave as many objects as it may, so that there may be more"
    )
    exact_above: Probability | None = Field(
        description="Where there may be more, the lowest score given: counts at thresholds above"
        " it are exact. Null where all counts are",
        examples=[0.03125],
    )
    steps: list[Probability] = Field(description="Thresholds, rising", examples=[[0.25, 0.5, 0.75]])
    classes: list[PreviewClass] = Field(description="In the order of labels")
    detections: list[PreviewDetection] = Field(
        description="All that reach the floor, best first, to be filtered without asking again"
    )
    timings: Timings


class ModelSummary(_Answer):
    """A model in the list of models."""

    name: str = Field(examples=["pets"])
    version: str = Field(description="Which of the models of its name", examples=["1"])
    sha256: str = Field(description="The digest of the file", examples=["9f86d081884c7d65" * 4])
    loaded_at: datetime | None = Field(description="When it began to serve, UTC")
    problem: str | None = Field(
        description="Why the file as it is now is not what serves; null where it is"
    )
    class_names: list[str] = Field(examples=[["dog", "cat"]])
    thresholds: dict[str, Probability] = Field(
        description="The file's threshold of each class", examples=[{"dog": 0.5, "cat": 0.25}]
    )
    threshold_policy: str = Field(description="How they were chosen", examples=["f1"])


class ModelList(_Answer):
    """The models that the service has."""

    models: list[ModelSummary]


class ModelDetail(_Answer):
    """Everything that a model says of itself."""

    name: str = Field(examples=["pets"])
    version: str = Field(description="Which of the models of its name", examples=["1"])
    sha256: str = Field(description="The digest of the file", examples=["9f86d081884c7d65" * 4])
    loaded_at: datetime | None = Field(description="When it began to serve, UTC")
    problem: str | None = Field(
        description="Why the file as it is now is not what serves; null where it is"
    )
    providers: list[str] = Field(
        description="What runs it, by onnxruntime's names", examples=[["CPUExecutionProvider"]]
    )
    threshold_policy: str = Field(description="How the thresholds were chosen", examples=["f1"])
    card: DetectorCard


class Health(_Answer):
    """A sign of life."""

    status: Literal["alive"]


class ModelHealth(_Answer):
    """Whether one model answers."""

    name: str = Field(examples=["pets"])
    version: str = Field(examples=["1"])
    ready: bool
    problem: str | None = Field(
        description="Why the file as it is now is not what serves; null where it is"
    )


class Readiness(_Answer):
    """What can be asked."""

    status: Literal["ready"]
    models: list[ModelHealth]
    problems: list[str] = Field(
        description="What an operator should look at: files that do not serve as they are"
    )


class HistogramPair(_Answer):
    """Two histograms over the same bins, and how far apart they are."""

    drift: Literal["unknown", "stable", "moderate", "major"] = Field(
        description="In a word: `stable` for a PSI below 0.1, `moderate` below 0.25, else `major`;"
        " `unknown` without one",
        examples=["stable"],
    )
    psi: float | None = Field(
        ge=0.0,
        description="Population stability index; null while there are too few detections",
        examples=[0.034],
    )
    psi_by_chance: float | None = Field(
        ge=0.0,
        description="What it would be on average if nothing had changed, from the number of"
        " detections alone",
        examples=[0.02],
    )
    held_out: list[Annotated[int, Field(ge=0)]] = Field(
        description="Detections on held-out images, in each bin", examples=[[120, 118, 131]]
    )
    live: list[Annotated[float, Field(ge=0.0)]] = Field(
        description="Detections of late, in each bin; older ones count less",
        examples=[[98.5, 101.2, 133.9]],
    )


class ClassDriftAnswer(_Answer):
    """The scores of one class."""

    class_name: str = Field(alias="class", description="The class's name", examples=["dog"])
    threshold: Probability = Field(description="The file's own", examples=[0.5])
    edges: list[Probability] = Field(
        description="What bounds the bins, one more than there are bins; none where held-out"
        " images had too few detections of this class",
        examples=[[0.5, 0.75, 0.9, 1.0]],
    )
    scores: HistogramPair = Field(description="Over the bins of `edges`")


class DriftAnswer(_Answer):
    """How far detections have moved from those that the thresholds were made from."""

    model: str = Field(description="The model's name", examples=["retinanet-tiny"])
    version: str = Field(description="Which of the models of this name", examples=["1"])
    sha256: str = Field(description="Digest of its file")
    class_names: list[str] = Field(description="In the order of labels", examples=[["dog", "cat"]])
    mix: HistogramPair = Field(description="How detections spread over classes: a bin each")
    classes: list[ClassDriftAnswer] = Field(description="In the order of labels")


class ProblemDetails(_Answer):
    """An error, as RFC 9457 has it."""

    type: str = Field(description="`about:blank`: the title says it", examples=["about:blank"])
    title: str = Field(description="The status in words", examples=["Unprocessable Entity"])
    status: int = Field(description="The HTTP status", examples=[422])
    detail: str = Field(
        description="What went wrong, naming the value at fault",
        examples=["classes: unknown class 'cow'; this model knows: dog, cat"],
    )
    error: str = Field(description="`detail` again, where v2 inference clients look for it")
    request_id: str = Field(description="Also in `X-Request-ID` and in the service's log")
