"""The options of a detection request, and what they mean for a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

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
from service.core.detections import OFF, DetectionParams
from service.core.errors import ProblemError, short

_MOST_OPTIONS = 64
_MOST_ENTRIES = 10_000


def _not_bool(value: object) -> object:
    if isinstance(value, bool):  # pydantic takes true for 1
        raise PydanticCustomError("number_type", "Input should be a number, not true or false")
    return value


def _from_text(value: object) -> object:
    """JSON that came as text, as it does in a query or a form."""
    if not isinstance(value, str):
        return _not_too_long(value)
    try:
        return _not_too_long(orjson.loads(value))
    except orjson.JSONDecodeError as error:
        raise PydanticCustomError("json_invalid", "Invalid JSON") from error


def _not_too_long(value: object) -> object:
    """Pydantic would make an error for each of a million entries."""
    if isinstance(value, list | dict) and len(value) > _MOST_ENTRIES:
        raise PydanticCustomError("too_long", f"Input has more than {_MOST_ENTRIES} entries")
    return value


def _listed(value: object) -> object:
    """A list of names as JSON has it; a name may have a comma in it."""
    value = _not_too_long(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    return value


Probability = Annotated[
    float, Field(ge=0.0, le=1.0, allow_inf_nan=False), BeforeValidator(_not_bool)
]
Names = Annotated[str | tuple[str, ...], BeforeValidator(_listed)]
Format = Literal["json", "image", "coco"]


class ModelOptions(BaseModel):
    """Which model answers."""

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
    thresholds: Annotated[dict[str, Probability], BeforeValidator(_from_text)] | None = Field(
        None,
        description="Thresholds by class, a JSON object. Classes that it leaves out keep"
        " `threshold`, or the file's own.",
        examples=['{"dog": 0.7}'],
    )
    classes: Names | None = Field(
        None,
        description="Only these classes, separated by commas.",
        examples=["dog,cat"],
    )
    iou: Probability | None = Field(
        None,
        description="Of two boxes of a class that overlap by more, only the better stays.",
        examples=[0.5],
    )
    max_detections: Annotated[int, Field(ge=1), BeforeValidator(_not_bool)] | None = Field(
        None,
        description="At most so many detections an image, the best. No more than the model gives.",
        examples=[10],
    )
    format: Format = Field(
        "json",
        description="`json`: as described. `image`: the one image with its boxes drawn in, as PNG,"
        " or JPEG where `Accept` prefers it. `coco`: a list of results as COCO's tools read them.",
        examples=["json"],
    )
    image_ids: (
        Annotated[
            tuple[StrictInt | StrictStr, ...], Field(max_length=64), BeforeValidator(_from_text)
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
        description="The least score of interest. Left out: the lowest of `steps`, or 0.05.",
        examples=[0.05],
    )
    steps: (
        Annotated[
            tuple[Probability, ...],
            Field(min_length=1, max_length=1001),
            BeforeValidator(_from_text),
        ]
        | None
    ) = Field(
        None,
        description="The thresholds to count at, a JSON list; none below the floor. Left out: the"
        " hundredths from the floor to 1.",
        examples=["[0.25, 0.5, 0.75]"],
    )
    classes: Names | None = Field(
        None, description="Only these classes, separated by commas.", examples=["dog,cat"]
    )
    iou: Probability | None = Field(
        None,
        description="Of two boxes of a class that overlap by more, only the better stays.",
        examples=[0.5],
    )


_FLOOR = 0.05  # of a preview: below it, most models see something everywhere

# Pydantic names the alternatives of a union among the places of an error.
_UNION = {"str", "int", "tuple[str, ...]", "strict-int", "strict-str"}


T = TypeVar("T", bound=ModelOptions)


def parse_options(pairs: Iterable[tuple[str, object]]) -> DetectOptions:
    """Read the options of a detection; as `read_options`."""
    return read_options(pairs, DetectOptions)


def read_options(pairs: Iterable[tuple[str, object]], kind: type[T]) -> T:
    """Read options from query parameters, form fields and members of JSON.

    Args:
        pairs: Names and values; text, or what JSON has.
        kind: The options that there are.

    Returns:
        The options.

    Raises:
        ProblemError: 422 for an option that is unknown, out of range, or given twice.
    """
    given: dict[str, object] = {}
    for name, value in pairs:
        if len(given) >= _MOST_OPTIONS:
            raise ProblemError(422, f"more than {_MOST_OPTIONS} options are given")
        if name in given:
            raise ProblemError(422, f"option {short(name)} is given twice")
        given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ProblemError(422, f"unknown option {short(name)}; known: {known}") from error
        places = [part for part in first["loc"][1:] if part not in _UNION]
        place = ".".join([name, *(short(part) for part in places)])
        raise ProblemError(422, f"{place} is {short(first['input'])}: {first['msg']}") from error


def resolve(options: DetectOptions, card: DetectorCard) -> DetectionParams:
    """What a request wants of a model: its options over the file's own values.

    Args:
        options: The request's.
        card: The model's.

    Returns:
        The values in force.

    Raises:
        ProblemError: 422 for an unknown class, or more detections than the model gives.
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
) -> tuple[DetectionParams, list[float]]:
    """What a preview wants of a model, and the thresholds to count at, rising.

    Args:
        options: The request's.
        card: The model's.

    Returns:
        The floor as the threshold of every class asked for, and the steps.

    Raises:
        ProblemError: 422 for an unknown class, or a step below the floor.
    """
    given = options.steps
    lowest = _FLOOR if given is None else min(given)
    floor = lowest if options.floor is None else options.floor
    if given is not None and min(given) < floor:
        raise ProblemError(422, f"steps holds {min(given)}, which is below the floor {floor}")
    hundredths = [step / 100 for step in range(101)]
    steps = [step for step in hundredths if step >= floor] if given is None else sorted(set(given))
    thresholds = np.full(len(card.class_names), floor, dtype=np.float32)
    _switch_off(thresholds, options.classes, card)
    iou = card.iou_threshold if options.iou is None else options.iou
    return DetectionParams(thresholds, iou, card.max_detections), steps


def _switch_off(
    thresholds: npt.NDArray[np.float32], classes: str | tuple[str, ...] | None, card: DetectorCard
) -> None:
    """Let only these classes be found."""
    if classes is None:
        return
    wanted = [_index(name, card, "classes") for name in _names(classes, card)]
    thresholds[np.setdiff1d(np.arange(len(thresholds)), wanted)] = OFF


def _names(classes: str | tuple[str, ...], card: DetectorCard) -> Iterable[str]:
    if not isinstance(classes, str):
        return classes
    if classes in card.class_names:  # a name may have a comma in it
        return [classes]
    return [name.strip() for name in classes.split(",")]


def _index(name: str, card: DetectorCard, option: str) -> int:
    if name not in card.class_names:
        known = ", ".join(card.class_names)
        raise ProblemError(422, f"{option}: unknown class {short(name)}; this model knows: {known}")
    return card.class_names.index(name)
