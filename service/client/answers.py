"""What the service answers, as dataclasses, and how its JSON becomes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Box = tuple[float, float, float, float]


class ServiceError(Exception):
    """The service refused, failed, or did not answer.

    Attributes:
        status: The HTTP status; None where there was no answer.
        detail: One sentence, the service's own where it gave one.
        request_id: What to look for in the service's log; None where there was no answer.
    """

    def __init__(self, status: int | None, detail: str, request_id: str | None = None) -> None:
        super().__init__(status, detail, request_id)
        self.status = status
        self.detail = detail
        self.request_id = request_id

    def __str__(self) -> str:
        return self.detail if self.status is None else f"{self.status}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Detection:
    """One object.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the image, upright.
        score: A float32, in [0, 1].
        label: The class's place in the model's list.
        class_name: The class.
        threshold: What the score had to reach: the threshold of its class that was in force. Of a
            preview, the model's own.
    """

    box: Box
    score: float
    label: int
    class_name: str
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the score reaches the threshold: always, but in a preview."""
        return self.score >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """As the service's JSON has it."""
        return {
            "box": list(self.box),
            "score": self.score,
            "label": self.label,
            "class": self.class_name,
            "threshold": self.threshold,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What was found in one image. Iterates over its detections.

    Attributes:
        model: The name of the model that answered.
        version: Its version.
        width: Of the image in pixels, upright.
        height: Of the image in pixels.
        detections: Best first.
        timings: Milliseconds of the request's parts, by name; of all images of a list together.
    """

    model: str
    version: str
    width: int
    height: int
    detections: tuple[Detection, ...]
    timings: Mapping[str, float]

    def __iter__(self) -> Iterator[Detection]:
        return iter(self.detections)

    def __len__(self) -> int:
        return len(self.detections)

    def to_dict(self) -> dict[str, Any]:
        """`image` and `detections`, as the service's JSON has them."""
        return {
            "image": {"width": self.width, "height": self.height},
            "detections": [one.to_dict() for one in self.detections],
        }


@dataclass(frozen=True, slots=True)
class ClassPreview:
    """How many boxes of a class would stand at each threshold.

    Attributes:
        class_name: The class.
        label: Its place in the model's list.
        threshold: The model's own.
        counts: One number for each of the preview's `steps`.
    """

    class_name: str
    label: int
    threshold: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """Every box of an image from a floor on, whatever its class's threshold.

    Attributes:
        model: The name of the model that answered.
        version: Its version.
        width: Of the image in pixels, upright.
        height: Of the image in pixels.
        floor: The score that every box of `detections` reaches.
        truncated: Whether there may be more boxes than the model gives at once.
        exact_above: Where there may be, the score above which all is exact; else None.
        steps: Thresholds, rising, that the counts are for.
        classes: In the order of labels.
        detections: Best first; `passed` tells which reach the model's thresholds.
        timings: Milliseconds of the request's parts, by name.
    """

    model: str
    version: str
    width: int
    height: int
    floor: float
    truncated: bool
    exact_above: float | None
    steps: tuple[float, ...]
    classes: tuple[ClassPreview, ...]
    detections: tuple[Detection, ...]
    timings: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the service.

    Attributes:
        name: What requests call it.
        version: Which of the models of its name.
        sha256: The digest of its file.
        class_names: In the order of labels.
        thresholds: The file's threshold of each class.
        threshold_policy: How they were chosen.
        problem: Why the file as it is now is not what serves; None where it is.
    """

    name: str
    version: str
    sha256: str
    class_names: tuple[str, ...]
    thresholds: Mapping[str, float]
    threshold_policy: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything that a model says of itself.

    Attributes:
        name: What requests call it.
        version: Which of the models of its name.
        sha256: The digest of its file.
        providers: What runs it, by onnxruntime's names.
        card: The file's card as JSON has it; `DetectorCard.model_validate(card)` of
            `export.card` gives it types.
    """

    name: str
    version: str
    sha256: str
    providers: tuple[str, ...]
    card: Mapping[str, Any]


def read_result(body: Any) -> Result:
    """The answer for one image."""
    return _result(body, body)


def read_results(body: Any) -> list[Result | ServiceError]:
    """The answer for a list of images: an error in the place of one that could not be read."""
    return [
        _failure(one["error"], body) if "error" in one else _result(one, body)
        for one in body["results"]
    ]


def _failure(error: Any, body: Any) -> ServiceError:
    return ServiceError(error["status"], error["detail"], body["request_id"])


def _result(one: Any, body: Any) -> Result:
    return Result(
        model=body["model"],
        version=body["version"],
        width=one["image"]["width"],
        height=one["image"]["height"],
        detections=tuple(_detection(found, found["threshold"]) for found in one["detections"]),
        timings=body["timings"],
    )


def _detection(found: Any, threshold: float) -> Detection:
    x1, y1, x2, y2 = found["box"]
    return Detection((x1, y1, x2, y2), found["score"], found["label"], found["class"], threshold)


def read_preview(body: Any) -> Preview:
    """The answer of a preview."""
    classes = tuple(
        ClassPreview(one["class"], one["label"], one["threshold"], tuple(one["counts"]))
        for one in body["classes"]
    )
    own = {one.label: one.threshold for one in classes}
    return Preview(
        model=body["model"],
        version=body["version"],
        width=body["image"]["width"],
        height=body["image"]["height"],
        floor=body["floor"],
        truncated=body["truncated"],
        exact_above=body["exact_above"],
        steps=tuple(body["steps"]),
        classes=classes,
        detections=tuple(_detection(one, own[one["label"]]) for one in body["detections"]),
        timings=body["timings"],
    )


def read_models(body: Any) -> list[Model]:
    """The list of models."""
    return [
        Model(
            name=one["name"],
            version=one["version"],
            sha256=one["sha256"],
            class_names=tuple(one["class_names"]),
            thresholds=one["thresholds"],
            threshold_policy=one["threshold_policy"],
            problem=one["problem"],
        )
        for one in body["models"]
    ]


def read_card(body: Any) -> ModelCard:
    """One model."""
    return ModelCard(
        name=body["name"],
        version=body["version"],
        sha256=body["sha256"],
        providers=tuple(body["providers"]),
        card=body["card"],
    )


def read_ready(body: Any) -> bool:
    """The readiness of a service that answered with success."""
    return bool(body["status"])
