"""Errors as RFC 9457 problem details, with the member `error` that v2 inference clients read."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from asgi_correlation_id import correlation_id
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"

_QUOTED = 100  # characters of a value in an error
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _QUOTED + 1
_REPR.maxlist = _REPR.maxdict = _REPR.maxtuple = 20
_REPR.maxlevel = 2  # 20 in each of 20 in each ... of the default 6 levels takes minutes


class ProblemError(Exception):
    """An error that is answered to the client; its detail names the value at fault."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def problem_response(
    status: int, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    """Return the answer for an error of the request that is being handled."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "error": detail,
        "request_id": correlation_id.get() or "",
    }
    return Response(orjson.dumps(body), status, dict(headers or {}), MEDIA_TYPE)


def short(value: object) -> str:
    """Quote a value for an error message, in at most 100 characters.

    Takes no longer for a large value than for a small one.

    >>> short("cow")
    "'cow'"
    """
    text = repr(value[:_QUOTED]) if isinstance(value, str | bytes) else _REPR.repr(value)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 3]}..."


def install(app: FastAPI) -> None:
    """Make an application answer every error as a problem."""
    app.exception_handler(ProblemError)(_on_problem)
    app.exception_handler(HTTPException)(_on_http_exception)


async def _on_problem(request: Request, error: ProblemError) -> Response:  # noqa: ARG001
    return problem_response(error.status, error.detail, error.headers)


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    detail = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND and detail == HTTPStatus.NOT_FOUND.phrase:
        detail = f"there is nothing at {short(request.url.path)}; /docs lists what there is"
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not answered at {short(request.url.path)}"
        methods = headers.get("Allow", "").split(", ")
        headers["Allow"] = ", ".join([*methods, "HEAD"] if methods == ["GET"] else methods)
    return problem_response(error.status_code, detail, headers)
