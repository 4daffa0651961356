"""The detection of objects: the options of a request, the parameters that they resolve to, results.

Each option is a field of one model, which reads query parameters, form fields and JSON alike and
is what the OpenAPI document is made from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from export.card import DetectorCard
from service.core.errors import ProblemError, short

# A threshold that no score reaches. It switches a class off inside the graph, so that its
# detections take no place among the candidates of the other classes.
OFF = 2.0

_MOST_OPTIONS = 64
_MOST_ENTRIES = 10_000


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic takes true for 1
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


def _parse_json(value: object) -> object:
    """Parse JSON that came as text, in a query or a form."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise PydanticCustomError("json_invalid", "Invalid JSON") from error
    return _bounded(value)


def _bounded(value: object) -> object:
    """Refuse long lists: pydantic would make an error for each of a million entries."""
    if isinstance(value, list | dict) and len(value) > _MOST_ENTRIES:
        raise PydanticCustomError("too_long", f"Input has more than {_MOST_ENTRIES} entries")
    return value


def _names(value: object) -> object:
    """Take a list of names, as JSON has it; a name may contain a comma."""
    value = _bounded(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    return value


Probability = Annotated[
    float, Field(ge=0.0, le=1.0, allow_inf_nan=False), BeforeValidator(_refuse_bool)
]
Classes = Annotated[
    Annotated[str | tuple[str, ...], BeforeValidator(_names)] | None,
    Field(description="Only these classes, separated by commas.", examples=["dog,cat"]),
]
Iou = Annotated[
    Probability | None,
    Field(
        description="Of two boxes of a class that overlap by more, only the better stays.",
        examples=[0.5],
    ),
]


class ModelOptions(BaseModel):
    """The choice of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(
        None,
        description="The model's name. It may be left out where only one name is served.",
        examples=["pets"],
    )
    version: str | None = Field(
        None, description="The model's version. Left out: the newest.", examples=["1"]
    )


class DetectOptions(ModelOptions):
    """Options of a detection: query parameters, form fields, or members of a JSON body."""

    threshold: Probability | None = Field(
        None,
        description="The score that a detection of any class must reach, in place of the file's"
        " thresholds.",
        examples=[0.5],
    )
    thresholds: Annotated[dict[str, Probability], BeforeValidator(_parse_json)] | None = Field(
        None,
        description="Thresholds per class, a JSON object. Classes that it leaves out keep"
        " `threshold`, or the file's own.",
        examples=['{"dog": 0.7}'],
    )
    classes: Classes = None
    iou: Iou = None
    max_detections: Annotated[int, Field(ge=1), BeforeValidator(_refuse_bool)] | None = Field(
        None,
        description="The most detections per image, the best first. At most the model's own limit.",
        examples=[10],
    )
    format: Literal["json", "image", "coco"] = Field(
        "json",
        description="`json`: as described. `image`: the one image with its boxes drawn in, as PNG,"
        " or JPEG where `Accept` prefers it. `coco`: a list of results as COCO's tools read them.",
        examples=["json"],
    )
    image_ids: (
        Annotated[
            tuple[StrictInt | StrictStr, ...], Field(max_length=64), BeforeValidator(_parse_json)
        ]
        | None
    ) = Field(
        None,
        description="With `format=coco`, the `image_id` of each image, a JSON list. Left out: 0, 1"
        " and so on, in the order sent.",
        examples=["[17, 42]"],
    )


class PreviewOptions(ModelOptions):
    """Options of a preview of thresholds."""

    floor: Probability | None = Field(
        None,
        description="The lowest score of interest. Left out: the lowest of `steps`, or 0.05.",
        examples=[0.05],
    )
    steps: (
        Annotated[
            tuple[Probability, ...],
            Field(min_length=1, max_length=1001),
            BeforeValidator(_parse_json),
        ]
        | None
    ) = Field(
        None,
        description="The thresholds to count at, a JSON list; none below the floor. Left out: the"
        " hundredths from the floor to 1.",
        examples=["[0.25, 0.5, 0.75]"],
    )
    classes: Classes = None
    iou: Iou = None


_FLOOR = 0.05  # of a preview: below it, most models find boxes everywhere

# Pydantic names the alternatives of a union in the location of an error.
_UNION = {"str", "int", "tuple[str, ...]", "strict-int", "strict-str"}

Options = TypeVar("Options", bound=ModelOptions)


def read_options(pairs: Iterable[tuple[str, object]], kind: type[Options]) -> Options:
    """Read options from names and values, which are text or any value of JSON.

    Raises:
        ProblemError: 422 if an option is unknown, out of range, or given twice.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if len(values) >= _MOST_OPTIONS:
            raise ProblemError(422, f"more than {_MOST_OPTIONS} options are given")
        if name in values:
            raise ProblemError(422, f"option {short(name)} is given twice")
        values[name] = value
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ProblemError(422, f"unknown option {short(name)}; known: {known}") from error
        inner = [short(part) for part in first["loc"][1:] if part not in _UNION]
        where = ".".join([name, *inner])
        raise ProblemError(422, f"{where} is {short(first['input'])}: {first['msg']}") from error


class DetectorModel(Protocol):
    """A served detector, as far as metrics and statistics describe it."""

    name: str
    version: str
    sha256: str
    card: DetectorCard


@dataclass(frozen=True)
class DetectionParams:
    """Thresholds and limits in force for one request.

    Attributes:
        class_thresholds: float32 `[C]`; `OFF` for classes that were not asked for.
        iou_threshold: IoU above which NMS drops the lower-scored box of a class, in [0, 1].
        max_detections: At least 1.
    """

    class_thresholds: npt.NDArray[np.float32]
    iou_threshold: float
    max_detections: int

    def is_shipped_with(self, card: DetectorCard) -> bool:
        """Whether these are the thresholds and the IoU of the file itself."""
        shipped = np.array(card.class_thresholds, dtype=np.float32)
        return self.iou_threshold == card.iou_threshold and np.array_equal(
            self.class_thresholds, shipped
        )


@dataclass(frozen=True)
class Detections:
    """Detections in one image, in descending order of score.

    Attributes:
        boxes: float32 `[N, 4]`, x1, y1, x2, y2 in pixels of the model's input.
        scores: float32 `[N]`, in [0, 1], descending.
        labels: int64 `[N]`, indices into the card's class names.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outputs:
    """Outputs of the graph for a batch, padded to `M` detections per image.

    Attributes:
        boxes: float32 `[B, M, 4]`, x1, y1, x2, y2 in pixels of the model's input.
        scores: float32 `[B, M]`, in [0, 1], descending; 0 pads.
        labels: int64 `[B, M]`, indices into the card's class names; -1 pads.
        num_detections: int64 `[B]`, in [0, M].
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    num_detections: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.boxes)

    def image(self, index: int) -> Detections:
        """Return the detections of one image of the batch."""
        number = int(self.num_detections[index])
        return Detections(
            self.boxes[index, :number], self.scores[index, :number], self.labels[index, :number]
        )

    def part(self, start: int, stop: int) -> Outputs:
        """Return the outputs of images `start` to `stop` (exclusive)."""
        rows = slice(start, stop)
        return Outputs(
            self.boxes[rows], self.scores[rows], self.labels[rows], self.num_detections[rows]
        )


def resolve(options: DetectOptions, card: DetectorCard) -> DetectionParams:
    """Apply a request's options over the file's own values.

    Raises:
        ProblemError: 422 if a class is unknown, or if more detections are asked for than the model
            returns.
    """
    thresholds = np.array(card.class_thresholds, dtype=np.float32)
    if options.threshold is not None:
        thresholds[:] = options.threshold
    for name, value in (options.thresholds or {}).items():
        thresholds[_index(name, card, "thresholds")] = value
    _switch_off(thresholds, options.classes, card)
    number = options.max_detections or card.max_detections
    if number > card.max_detections:
        raise ProblemError(
            422, f"max_detections is {number}: this model gives at most {card.max_detections}"
        )
    iou = card.iou_threshold if options.iou is None else options.iou
    return DetectionParams(thresholds, iou, number)


def resolve_preview(
    options: PreviewOptions, card: DetectorCard
) -> tuple[DetectionParams, float, list[float]]:
    """Return the parameters of a preview, its floor, and the thresholds to count at, ascending.

    The floor, a float32, becomes the threshold of every class asked for.

    Raises:
        ProblemError: 422 if a class is unknown, or a step is below the floor.
    """
    lowest = _FLOOR if options.steps is None else min(options.steps)
    floor = lowest if options.floor is None else options.floor
    if options.steps is None:
        steps = [step / 100 for step in range(101) if step / 100 >= floor]
    elif lowest < floor:
        raise ProblemError(422, f"steps holds {lowest}, which is below the floor {floor}")
    else:
        steps = sorted(set(options.steps))
    thresholds = np.full(len(card.class_names), floor, dtype=np.float32)
    _switch_off(thresholds, options.classes, card)
    iou = card.iou_threshold if options.iou is None else options.iou
    return DetectionParams(thresholds, iou, card.max_detections), float(np.float32(floor)), steps


def _switch_off(
    thresholds: npt.NDArray[np.float32], classes: str | tuple[str, ...] | None, card: DetectorCard
) -> None:
    """Switch off every class but those asked for."""
    if classes is None:
        return
    if isinstance(classes, str):  # a name may contain a comma
        whole = classes in card.class_names
        classes = (classes,) if whole else tuple(name.strip() for name in classes.split(","))
    kept = [_index(name, card, "classes") for name in classes]
    thresholds[np.setdiff1d(np.arange(len(thresholds)), kept)] = OFF


def _index(name: str, card: DetectorCard, option: str) -> int:
    if name not in card.class_names:
        known = ", ".join(card.class_names)
        raise ProblemError(422, f"{option}: unknown class {short(name)}; this model knows: {known}")
    return card.class_names.index(name)
