"""`GET /`: the page, from static files of this package alone."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from service.api.state import service_state
from service.core.errors import ProblemError, short
from service.http.encodings import accepts_gzip

router = APIRouter(include_in_schema=False)

STATIC = Path(__file__).parents[2] / "static"

_TYPES = {
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


# What `/docs` needs, which is there without the page too.
_REFERENCE = ("docs.html", "docs.js", "dom.js", "page.css")


@cache
def _assets() -> dict[str, tuple[str, bytes, bytes, str]]:
    """Return the type, content, compressed content and digest of each file of the page."""
    assets = {}
    for path in STATIC.iterdir():
        if path.suffix in _TYPES:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()[:16]
            compressed = gzip.compress(content, mtime=0)
            assets[path.name] = (_TYPES[path.suffix], content, compressed, digest)
    return assets


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return await static(request, "index.html")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The reference of requests and answers, from `/openapi.json`."""
    return await static(request, "docs.html")


@router.get("/favicon.ico")
async def favicon(request: Request) -> Response:
    """The icon, at the path that browsers try for pages that name none, such as `/docs`."""
    return await static(request, "icon.svg")


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """A file of the page."""
    asset = _assets().get(name)
    if not service_state(request).settings.page and name not in _REFERENCE:
        asset = None
    if asset is None:
        path = short(request.url.path)
        raise ProblemError(404, f"there is nothing at {path}; /docs lists what there is")
    media_type, content, compressed, digest = asset
    headers = {**_HEADERS, "ETag": f'"{digest}"'}
    if accepts_gzip(request.headers.get("accept-encoding", "")):
        content = compressed
        headers |= {"ETag": f'"{digest}-gzip"', "Content-Encoding": "gzip"}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        headers.pop("Content-Encoding", None)
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)
