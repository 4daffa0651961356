"""The OpenAPI document: options, request bodies with examples, and every error as a problem."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import FastAPI

from service.core.detections import ModelOptions
from service.core.errors import MEDIA_TYPE
from service.core.schema import ProblemDetails
from service.core.settings import Settings
from service.http.auth import is_public

_MEANINGS = {
    400: "The request is malformed: its body is not what its headers state, or an image is"
    " damaged.",
    401: "The request has no token, or an unknown one.",
    403: "Model control is off: `--model-control`, or tokens, switch it on.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    409: "The file cannot be served as it is. The previous model keeps serving.",
    413: "The body has more bytes, or an image more pixels, than this service reads.",
    415: "Not an image of a supported type.",
    422: "An option is out of range, or names a class that the model does not have.",
    429: "Too many images are waiting, or this client sends requests too often. Retry after"
    " `Retry-After` seconds.",
    500: "The service failed. The log has the reason beside the `request_id`.",
    503: "The model is not ready. Retry after `Retry-After` seconds.",
    504: "The answer was not ready in time.",
}

# A PNG of one white pixel.
_PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"
)
_FILE = {"type": "string", "format": "binary"}
_BASE64 = {"type": "string", "contentEncoding": "base64", "examples": [_PIXEL]}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses=` of a route that answers with these errors."""
    schema = {"$ref": f"#/components/schemas/{ProblemDetails.__name__}"}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": _MEANINGS[status], "content": content} for status in statuses}


def options_extra(path: str, kind: type[ModelOptions], *, many: bool) -> dict[str, Any]:
    """Return the `openapi_extra=` of a route that takes one image or, if `many`, lists."""
    curl = f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' URL{path}"
    binary = {"schema": _FILE, "examples": {"curl": _curl(curl)}}
    form_examples = {"one": _curl(f"curl -F file=@photo.jpg URL{path}")}
    json_examples: dict[str, Any] = {"one": {"summary": "One image", "value": {"image": _PIXEL}}}
    if many:
        form_examples["several"] = _curl(f"curl -F files=@a.jpg -F files=@b.jpg URL{path}")
        value = {"images": [_PIXEL, _PIXEL], "threshold": 0.5}
        json_examples["several"] = {"summary": "Several images", "value": value}
    in_json = {
        name: {**schema, "examples": [_as_json(example) for example in schema["examples"]]}
        for name, schema in kind.model_json_schema()["properties"].items()
    }
    in_text = {name: _as_text(schema) for name, schema in in_json.items()}
    content = {
        "multipart/form-data": {
            "schema": _body_schema("file", _FILE, in_text, many),
            "examples": form_examples,
        },
        "image/*": binary,
        "application/octet-stream": binary,
        "application/json": {
            "schema": _body_schema("image", _BASE64, in_json, many),
            "examples": json_examples,
        },
    }
    parameters = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": schema,
        }
        for name, schema in in_text.items()
    ]
    return {"requestBody": {"required": True, "content": content}, "parameters": parameters}


def _curl(command: str) -> dict[str, str]:
    return {"summary": "With curl", "description": f"`{command}`"}


def _body_schema(
    name: str, image: dict[str, Any], options: dict[str, Any], many: bool
) -> dict[str, Any]:
    images: dict[str, Any] = {name: {**image, "description": "One image; the answer is one object"}}
    if many:
        description = f"Several images, in place of `{name}`; the answer has a list `results`"
        items = {"type": "array", "items": image, "minItems": 1, "description": description}
        images[f"{name}s"] = items
    return {
        "type": "object",
        "properties": {**images, **options},
        "oneOf": [{"required": [field]} for field in images],
        "additionalProperties": False,
    }


def _as_json(example: object) -> object:
    """Parse an example of a list or an object, which options write as text."""
    is_json = isinstance(example, str) and example[:1] in ("{", "[")
    return orjson.loads(str(example)) if is_json else example


def _as_text(schema: dict[str, Any]) -> dict[str, Any]:
    """Convert the schema of an option in JSON to that in a query or a form."""
    variants = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    simple = [one for one in variants if one.get("type") not in ("object", "array")]
    chosen = simple[0] if simple else {"type": "string", "contentMediaType": "application/json"}
    kept = {key: value for key, value in chosen.items() if key not in ("title", "default")}
    return {**kept, "description": schema["description"], "examples": schema["examples"]}


def install(app: FastAPI, settings: Settings) -> None:
    """Replace FastAPI's document by one that describes every error as it is answered.

    FastAPI adds a 422 to every route with a parameter. The settings add a 401 and a 429.
    """
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _correct(build(), settings)  # it keeps the document that it returns
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _correct(document: dict[str, Any], settings: Settings) -> None:
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas[ProblemDetails.__name__] = ProblemDetails.model_json_schema()
    has_tokens = settings.has_tokens
    if has_tokens:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        guarded = not is_public(path, settings)
        for operation in operations.values():
            responses = operation["responses"]
            if "HTTPValidationError" in str(responses.get("422")):
                del responses["422"]
            if guarded and has_tokens:
                operation["security"] = [{"bearer": []}]
                responses.setdefault("401", problems(401)[401])
            if guarded and (settings.rate_limit or has_tokens):
                responses.setdefault("429", problems(429)[429])
