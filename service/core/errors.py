"""Errors as RFC 9457 problem details, with the member `error` that v2 inference clients read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from service.core.schema import ProblemDetails

MEDIA_TYPE = "application/problem+json"

_QUOTED = 100  # characters of a value in an error
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = _QUOTED + 1
_BRIEF.maxlist = _BRIEF.maxdict = _BRIEF.maxtuple = 20
_BRIEF.maxlevel = 2  # 20 in each of 20 in each ... of the usual 6 levels takes minutes

_MEANINGS = {
    400: "The request is malformed: its body is not what its headers say, or an image is damaged.",
    401: "The request has no token, or one that is not known.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    409: "The file cannot be served as it is. The model before it goes on serving.",
    413: "The body has more bytes, or an image more pixels, than this service reads.",
    415: "Not an image of a kind that this service reads.",
    422: "An option has a value that cannot be, or names a class that the model does not know.",
    429: "Too many images wait already, or this client asks too often. Ask again after"
    " `Retry-After` seconds.",
    500: "The service failed. The log has the reason beside the `request_id`.",
    503: "The model is not ready. Ask again after `Retry-After` seconds.",
    504: "The answer was not ready in time.",
}


class ProblemError(Exception):
    """Raised to answer with an error.

    Args:
        status: The HTTP status.
        detail: One sentence for whoever sent the request; names the value at fault.
        headers: Sent along.
    """

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that answers with these errors."""
    return {
        status: {"model": ProblemDetails, "description": _MEANINGS[status]} for status in statuses
    }


def described(status: int) -> dict[str, Any]:
    """An error as the OpenAPI document has it."""
    schema = {"$ref": f"#/components/schemas/{ProblemDetails.__name__}"}
    return {"description": _MEANINGS[status], "content": {MEDIA_TYPE: {"schema": schema}}}


def problem_response(
    scope: Mapping[str, Any], status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """The answer that describes a problem.

    Args:
        scope: The ASGI scope of the request.
        status: The HTTP status.
        detail: What went wrong.
        headers: Sent along.
    """
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
        "request_id": scope.get("state", {}).get("request_id", ""),
    }
    return Response(orjson.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


def short(value: object) -> str:
    """A value as it is quoted in an error: recognisable, and never a page long.

    Takes no longer for a large value than for a small one.
    """
    if isinstance(value, str | bytes):
        value = value[:_QUOTED]
    text = repr(value) if isinstance(value, str | bytes) else _BRIEF.repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."


def install(app: FastAPI) -> None:
    """Make every error of an application a problem."""
    app.exception_handler(ProblemError)(_on_problem)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(RequestValidationError)(_on_validation_error)


async def _on_problem(request: Request, error: ProblemError) -> Response:
    return problem_response(request.scope, error.status, error.detail, error.headers)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"there is nothing at {short(request.url.path)}; /docs lists what there is"
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not answered at {short(request.url.path)}"
    return problem_response(request.scope, error.status_code, detail, error.headers)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return problem_response(request.scope, 422, f"{place}: {first['msg']}")
