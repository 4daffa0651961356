"""The page's files as HTTP answers; what they do in a browser is in tests/service/static."""

import gzip
import re

import pytest

from service.api.routes.page import STATIC

FILES = sorted(path.name for path in STATIC.iterdir())
LIMIT = 60_000  # bytes of everything, uncompressed


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/favicon.ico", "icon.svg", "image/svg+xml"),
        ("/static/page.js", "page.js", "text/javascript; charset=utf-8"),
        ("/static/page.css", "page.css", "text/css; charset=utf-8"),
    ],
)
def test_each_file_is_answered_as_it_is(client, path, name, kind):
    for encoding, zipped in (("identity", False), ("gzip, br", True)):
        response = client.get(path, headers={"Accept-Encoding": encoding})
        assert response.status_code == 200
        assert response.headers["content-type"] == kind
        assert response.content == (STATIC / name).read_bytes()  # decompressed by the client
        assert ("content-encoding" in response.headers) == zipped
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["vary"] == "Accept-Encoding"


def test_every_file_is_served(client):
    assert {"index.html", "page.js", "page.css"} <= set(FILES)
    for name in FILES:
        assert client.get(f"/static/{name}").status_code == 200, name


def test_the_policy_allows_this_origin_alone(client):
    for path in ("/", "/static/page.js"):
        policy = client.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; img-src 'self' blob: data:;")
        assert "unsafe" not in policy
        assert "http" not in policy


def test_the_page_keeps_to_its_policy():
    """Neither inline script nor style, nor any other address; the browser's tests see it work."""
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", page)
    for name in FILES:
        text = (STATIC / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//[a-z0-9-]+\.[a-z]", text), name


def test_a_file_that_is_known_is_not_sent_again(client):
    for encoding in ("identity", "gzip"):
        headers = {"Accept-Encoding": encoding}
        first = client.get("/", headers=headers)
        tag = first.headers["etag"]
        assert first.headers["cache-control"] == "no-cache"
        again = client.get("/", headers={**headers, "If-None-Match": tag})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
        assert client.get("/", headers={**headers, "If-None-Match": '"old"'}).status_code == 200
    tags = {
        client.get(f"/static/{name}", headers={"Accept-Encoding": encoding}).headers["etag"]
        for name in FILES
        for encoding in ("identity", "gzip")
    }
    assert len(tags) == 2 * len(FILES)  # a tag is of the very bytes


def test_head_has_the_headers_and_no_body(client):
    response = client.head("/", headers={"Accept-Encoding": "identity"})
    assert (response.status_code, response.content) == (200, b"")
    assert int(response.headers["content-length"]) == (STATIC / "index.html").stat().st_size


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "../app.py", "%2e%2e/app.py", ""])
def test_nothing_else_is_answered(client, problem, name):
    detail = problem(client.get(f"/static/{name}"), 404)
    assert "there is nothing at" in detail


def test_other_methods_are_refused(client, problem):
    problem(client.post("/"), 405)


def test_without_the_page_there_is_nothing(serve_with, problem):
    with serve_with(page=False) as client:
        for path in ("/", "/favicon.ico", "/static/page.js"):
            problem(client.get(path), 404)
        assert client.get("/health/live").status_code == 200


def test_it_is_no_part_of_the_api(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path in paths if path in ("/", "/favicon.ico") or "static" in path]


def test_it_is_small():
    sizes = {name: (STATIC / name).stat().st_size for name in FILES}
    assert sum(sizes.values()) < LIMIT, sizes
    packed = sum(len(gzip.compress((STATIC / name).read_bytes())) for name in FILES)
    assert packed < LIMIT / 3
