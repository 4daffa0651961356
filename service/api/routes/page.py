"""`GET /`: the page, from static files of this package alone."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.api.state import service_state
from service.core.errors import ProblemError, short

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[2] / "static"

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    # Browsers revalidate each file, so none is stale after an upgrade.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class _Asset:
    """A file of the page, plain and compressed."""

    kind: str
    content: bytes
    compressed: bytes
    digest: str


@cache
def _assets() -> dict[str, _Asset]:
    return {path.name: _asset(path) for path in STATIC.iterdir() if path.suffix in _KINDS}


def _asset(path: Path) -> _Asset:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    return _Asset(_KINDS[path.suffix], content, gzip.compress(content, mtime=0), digest)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, "index.html")


@router.api_route("/favicon.ico", methods=["GET", "HEAD"])
async def favicon(request: Request) -> Response:
    """The icon, at the path that browsers try for pages that name none, such as `/docs`."""
    return _answer(request, "icon.svg")


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(request: Request, name: str) -> Response:
    """One of the page's files."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    asset = _assets().get(name) if service_state(request).settings.page else None
    if asset is None:
        path = short(request.url.path)
        raise ProblemError(404, f"there is nothing at {path}; /docs lists what there is")
    zipped = "gzip" in request.headers.get("accept-encoding", "")
    tag = f'"{asset.digest}{"-gzip" if zipped else ""}"'
    headers = {**_HEADERS, "ETag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if zipped:
        headers["Content-Encoding"] = "gzip"
    body = asset.compressed if zipped else asset.content
    return Response(body, media_type=asset.kind, headers=headers)
