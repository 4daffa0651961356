"""Options and bodies as OpenAPI has them, with an example of each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from service.core.params import ModelOptions

# A PNG of one white pixel.
_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)

_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64", "examples": [_PIXEL]}


def request_body(path: str, kind: type[ModelOptions], *, many: bool) -> dict[str, Any]:
    """The `requestBody` of a route that takes images.

    Args:
        path: The route's, for the examples.
        kind: Its options.
        many: Whether it takes lists of images.
    """
    binary = {
        "schema": _FILE,
        "examples": {
            "curl": _curl(f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' URL{path}")
        },
    }
    return {
        "required": True,
        "content": {
            "multipart/form-data": _form(path, kind, many),
            "image/*": binary,
            "application/octet-stream": binary,
            "application/json": _json(kind, many),
        },
    }


def _curl(command: str) -> dict[str, str]:
    return {"summary": "With curl", "description": f"`{command}`"}


def _form(path: str, kind: type[ModelOptions], many: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"file": {**_FILE, "description": "One image; the answer is one object"}}
    examples = {"one": _curl(f"curl -F file=@photo.jpg URL{path}")}
    if many:
        description = "Any number of images, in place of `file`; the answer has a list `results`"
        own["files"] = {
            "type": "array",
            "items": _FILE,
            "minItems": 1,
            "description": description,
        }
        examples["several"] = _curl(f"curl -F files=@a.jpg -F files=@b.jpg URL{path}")
    schema = {
        "type": "object",
        "properties": {**own, **form_properties(kind)},
        **_one_of(own),
        "additionalProperties": False,
    }
    return {"schema": schema, "examples": examples}


def _json(kind: type[ModelOptions], many: bool) -> dict[str, Any]:
    own: dict[str, Any] = {"image": {**_BASE64, "description": "One image, or a data: URL of it"}}
    examples: dict[str, Any] = {"one": {"summary": "One image", "value": {"image": _PIXEL}}}
    if many:
        own["images"] = {
            "type": "array",
            "items": _BASE64,
            "minItems": 1,
            "description": "Any number of images, in place of `image`; the answer has a list"
            " `results`",
        }
        value = {"images": [_PIXEL, _PIXEL], "threshold": 0.5}
        examples["several"] = {"summary": "Several images", "value": value}
    schema = {
        "type": "object",
        "properties": {**own, **json_properties(kind)},
        **_one_of(own),
        "additionalProperties": False,
    }
    return {"schema": schema, "examples": examples}


def _one_of(names: Iterable[str]) -> dict[str, Any]:
    return {"oneOf": [{"required": [name]} for name in names]}


def query_parameters(kind: type[ModelOptions]) -> list[dict[str, Any]]:
    """Options as OpenAPI parameters."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": schema,
        }
        for name, schema in form_properties(kind).items()
    ]


def form_properties(kind: type[ModelOptions]) -> dict[str, dict[str, Any]]:
    """Options as the properties of an OpenAPI form: what is no number is text there."""
    return {name: _as_text(schema) for name, schema in json_properties(kind).items()}


def json_properties(kind: type[ModelOptions]) -> dict[str, dict[str, Any]]:
    """Options as the properties of a JSON object; null is as good as left out."""
    return {
        name: {**schema, "examples": [_from_example(one) for one in schema["examples"]]}
        for name, schema in kind.model_json_schema()["properties"].items()
    }


def _from_example(text: object) -> object:
    """An example as JSON has it: lists and objects are not text there."""
    is_json = isinstance(text, str) and text[:1] in ("{", "[")
    return orjson.loads(str(text)) if is_json else text


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    given = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    simple = [one for one in given if one.get("type") not in ("object", "array")]
    chosen = simple[0] if simple else {"type": "string", "contentMediaType": "application/json"}
    kept = {key: value for key, value in chosen.items() if key not in ("title", "default")}
    return {**kept, "description": schema["description"], "examples": schema["examples"]}
