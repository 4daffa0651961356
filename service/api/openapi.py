"""The OpenAPI document, made to say what is true."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.core.errors import MEDIA_TYPE, described
from service.core.settings import Settings
from service.http.auth import is_public


def install(app: FastAPI, settings: Settings) -> None:
    """Correct FastAPI's document in two points, and add what the settings ask of every request.

    It describes errors as `application/json`, where ours are problems; and it adds a 422 to every
    route with a parameter, also where no value can be wrong.
    """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            app.openapi_schema = _guarded(_corrected(document), settings)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _corrected(document: dict[str, Any]) -> dict[str, Any]:
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"] = {
                status: _as_problem(response) if int(status) >= 400 else response
                for status, response in operation["responses"].items()
                if not _is_added(response)
            }
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _guarded(document: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Add the bearer token and its 401, and the rate limit's 429, where there are any."""
    tokens = settings.tokens is not None or settings.tokens_file is not None
    if tokens:
        document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if is_public(path, settings):
            continue
        for operation in operations.values():
            if tokens:
                operation["security"] = [{"bearer": []}]
                operation["responses"].setdefault("401", described(401))
            if settings.rate_limit:
                operation["responses"].setdefault("429", described(429))
    return document


def _is_added(response: dict[str, Any]) -> bool:
    """Whether FastAPI added a response by itself."""
    schema = response.get("content", {}).get("application/json", {}).get("schema", {})
    return str(schema.get("$ref", "")).endswith("/HTTPValidationError")


def _as_problem(response: dict[str, Any]) -> dict[str, Any]:
    (content,) = response["content"].values()
    return {**response, "content": {MEDIA_TYPE: content}}
