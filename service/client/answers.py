"""The service's answers as dataclasses, and their construction from JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Box = tuple[float, float, float, float]


class ServiceError(Exception):
    """The service refused, failed, or did not answer.

    Attributes:
        status: The HTTP status; None if there was no answer.
        detail: One sentence, from the service where possible.
        request_id: Id of the request in the service's log; None if there was no answer.
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
    """One detected object.

    Attributes:
        box: x1, y1, x2, y2 in pixels of the upright image.
        score: A float32, in [0, 1].
        label: Index of the class in the model.
        class_name: Name of the class.
        threshold: The threshold of the class in force; in a preview, the model's own.
    """

    box: Box
    score: float
    label: int
    class_name: str
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether the score reaches the threshold: always true outside of previews."""
        return self.score >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the detection as in the service's JSON."""
        return {
            "box": list(self.box),
            "score": self.score,
            "label": self.label,
            "class": self.class_name,
            "threshold": self.threshold,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """The detections in one image. Iterates over them.

    Attributes:
        model: Name of the model.
        version: Version of the model.
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
        detections: In descending order of score.
        timings: Milliseconds of the request's stages by name, over all images of a list.
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
        """Return `image` and `detections` as in the service's JSON."""
        return {
            "image": {"width": self.width, "height": self.height},
            "detections": [one.to_dict() for one in self.detections],
        }


@dataclass(frozen=True, slots=True)
class ClassPreview:
    """The number of boxes of a class at each threshold.

    Attributes:
        class_name: Name of the class.
        label: Index of the class in the model.
        threshold: The model's own threshold.
        counts: One number for each of the preview's `steps`.
    """

    class_name: str
    label: int
    threshold: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Preview(Result):
    """All boxes of an image whose score reaches a floor, whatever the threshold of their class.

    Attributes:
        floor: The score that every detection reaches.
        truncated: Whether there may be more boxes than the model returns at once.
        exact_above: If truncated, the score above which all counts are exact; else None.
        steps: Thresholds of the counts, in ascending order.
        classes: In the order of labels.
    """

    floor: float
    truncated: bool
    exact_above: float | None
    steps: tuple[float, ...]
    classes: tuple[ClassPreview, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the service.

    Attributes:
        name: Name used in requests.
        version: Version under that name.
        sha256: Digest of the file.
        class_names: In the order of labels.
        thresholds: The file's threshold per class.
        threshold_policy: How the thresholds were chosen.
        problem: Why the file as it is now does not serve; None where it does.
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
    """A model with its whole card.

    Attributes:
        name: Name used in requests.
        version: Version under that name.
        sha256: Digest of the file.
        providers: onnxruntime's execution providers.
        card: The card as JSON; `export.card.DetectorCard.model_validate(card)` gives it types.
    """

    name: str
    version: str
    sha256: str
    providers: tuple[str, ...]
    card: Mapping[str, Any]


T = TypeVar("T")


def build(kind: type[T], body: Mapping[str, Any], **changes: Any) -> T:
    """Make a dataclass from the members of JSON with the names of its fields."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {name: changes[name] if name in changes else body[name] for name in names}
    return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def read_image(
    kind: type[T], body: Any, thresholds: Mapping[int, float] | None = None, **changes: Any
) -> T:
    """Read an image's answer; `thresholds` by label where its detections have none."""
    detections = [
        build(
            Detection,
            one,
            class_name=one["class"],
            threshold=one["threshold"] if thresholds is None else thresholds[one["label"]],
        )
        for one in body["detections"]
    ]
    return build(kind, body, detections=detections, **body["image"], **changes)


def read_results(body: Any) -> list[Result | ServiceError]:
    """Read the answer for a list of images, with an error for each that could not be read."""
    return [
        ServiceError(one["error"]["status"], one["error"]["detail"], body["request_id"])
        if "error" in one
        else read_image(Result, {**body, **one})
        for one in body["results"]
    ]


def read_preview(body: Any) -> Preview:
    """Read the answer of a preview."""
    classes = [build(ClassPreview, one, class_name=one["class"]) for one in body["classes"]]
    thresholds = {one.label: one.threshold for one in classes}
    return read_image(Preview, body, thresholds, classes=classes)
