"""The options of a detection request, and what they mean for a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError

from export.contract import DetectorCard
from service.model import OFF
from service.problems import ProblemError, short

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class DetectOptions(BaseModel):
    """Options, each as a query parameter or as a form field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: Probability | None = Field(
        None,
        description="The score that a detection of any class must reach, in place of the file's"
        " thresholds.",
        examples=[0.5],
    )
    thresholds: Json[dict[str, Probability]] | None = Field(
        None,
        description="Thresholds by class, a JSON object. Classes that it leaves out keep"
        " `threshold`, or the file's own.",
        examples=['{"dog": 0.7}'],
    )
    classes: str | None = Field(
        None,
        description="Only these classes, separated by commas.",
        examples=["dog,cat"],
    )
    iou: Probability | None = Field(
        None,
        description="Of two boxes of a class that overlap by more, only the better stays.",
        examples=[0.5],
    )
    max_detections: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="At most so many detections an image, the best. No more than the model gives.",
        examples=[10],
    )


@dataclass(frozen=True)
class Wanted:
    """Options as a model takes them.

    Attributes:
        class_thresholds: float32 `[C]`, in force for this request; `OFF` for classes left out.
        iou_threshold: In [0, 1].
        max_detections: At least 1.
    """

    class_thresholds: npt.NDArray[np.float32]
    iou_threshold: float
    max_detections: int


def parse_options(pairs: Iterable[tuple[str, str]]) -> DetectOptions:
    """Read options from query parameters and form fields.

    Args:
        pairs: Names and values.

    Returns:
        The options.

    Raises:
        ProblemError: 422 for an option that is unknown, out of range, or given twice.
    """
    given: dict[str, str] = {}
    for name, value in pairs:
        if name in given:
            raise ProblemError(422, f"option {short(name)} is given twice")
        given[name] = value
    try:
        return DetectOptions.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(DetectOptions.model_fields)
            raise ProblemError(422, f"unknown option {short(name)}; known: {known}") from error
        place = ".".join([name, *(short(part) for part in first["loc"][1:])])
        raise ProblemError(422, f"{place} is {short(first['input'])}: {first['msg']}") from error


def resolve(options: DetectOptions, card: DetectorCard) -> Wanted:
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
    if options.classes is not None:
        wanted = [_index(name, card, "classes") for name in _names(options.classes, card)]
        thresholds[np.setdiff1d(np.arange(len(thresholds)), wanted)] = OFF
    number = options.max_detections or card.max_detections
    if number > card.max_detections:
        raise ProblemError(
            422, f"max_detections is {number}: this model gives at most {card.max_detections}"
        )
    iou = card.iou_threshold if options.iou is None else options.iou
    return Wanted(thresholds, iou, number)


def query_parameters() -> list[dict[str, Any]]:
    """The options as OpenAPI parameters."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": schema,
        }
        for name, schema in form_properties().items()
    ]


def form_properties() -> dict[str, dict[str, Any]]:
    """The options as the properties of an OpenAPI form."""
    return {
        name: _without_null(schema)
        for name, schema in DetectOptions.model_json_schema()["properties"].items()
    }


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an option that is given: text cannot be null."""
    given = next(one for one in schema["anyOf"] if one.get("type") != "null")
    return {**given, "description": schema["description"], "examples": schema["examples"]}


def _names(classes: str, card: DetectorCard) -> list[str]:
    if classes in card.class_names:  # a name may have a comma in it
        return [classes]
    return [name.strip() for name in classes.split(",")]


def _index(name: str, card: DetectorCard, option: str) -> int:
    if name not in card.class_names:
        known = ", ".join(card.class_names)
        raise ProblemError(422, f"{option}: unknown class {short(name)}; this model knows: {known}")
    return card.class_names.index(name)
