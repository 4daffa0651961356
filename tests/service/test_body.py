import anyio
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.app import create_app
from service.body import read_upload
from service.problems import ProblemError

URL = "/v1/detect"


@pytest.mark.parametrize(
    "kind", ["", "application/octet-stream", "image/anything", "IMAGE/PNG; x=y"]
)
def test_the_bytes_say_what_the_image_is(client, png, kind):
    headers = {"Content-Type": kind} if kind else {}
    assert client.post(URL, content=png, headers=headers).status_code == 200


def form_body(*parts: bytes) -> dict:
    body = b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"
    return {"content": body, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


def test_malformed_requests_are_400(client, png, problem):
    cases = [
        ({"content": b""}, "the body: the image is empty"),
        ({"content": png[:200]}, "the body: the PNG image is damaged"),
        ({"files": {"file": ("a.png", png[:200])}}, "file 'a.png': the PNG image is damaged"),
        ({"files": {"file": ("a.png", b"")}}, "file 'a.png': the image is empty"),
        ({"files": {"picture": ("a.png", png)}}, "['picture']: send one `file`, or only `files`"),
        ({"files": [("file", ("a", png)), ("file", ("b", png))]}, "['file', 'file']"),
        ({"files": [("file", ("a", png)), ("files", ("b", png))]}, "['file', 'files']"),
        (form_body(b'Content-Disposition: form-data; name="iou"\r\n\r\n0.5'), "holds no file"),
        (
            form_body(b'Content-Disposition: form-data; name="file"\r\n\r\nx'),
            "a part without a filename is text",
        ),
        (form_body(b"Content-Type: text/plain\r\n\r\nx"), "the form is malformed"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, "boundary"),
        (
            {
                "content": b"no boundary in here",
                "headers": {"Content-Type": "multipart/form-data; boundary=b"},
            },
            "the form",
        ),
        ({"files": [("files", (f"{i}", png)) for i in range(17)]}, "Too many files"),
    ]
    for request, message in cases:
        assert message in problem(client.post(URL, **request), 400), request


def test_a_form_that_ends_in_the_middle_of_a_file_is_400(client, png, problem):
    start = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    problem(client.post(URL, content=start + png, headers=headers), 400)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/x-www-form-urlencoded", "text/plain"]
)
def test_another_content_type_is_415(client, png, kind, problem):
    detail = problem(client.post(URL, content=png, headers={"Content-Type": kind}), 415)
    assert kind in detail
    assert "multipart/form-data" in detail


@pytest.fixture(scope="module")
def small(settings, model):
    """A service that reads no more than 4,000 bytes."""
    limits = settings.model_copy(update={"max_upload_bytes": 4000})
    with TestClient(create_app(limits, model)) as client:
        yield client


def test_a_body_that_says_it_is_too_large_is_413(small, problem):
    assert "4000 bytes" in problem(small.post(URL, content=b"x" * 4001), 413)


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=b"])
def test_a_body_that_turns_out_too_large_is_413_and_not_read_on(kind):
    received = 0

    async def receive():
        nonlocal received
        received += 1
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        body = (head if received == 1 else b"").ljust(1000, b"x")
        return {"type": "http.request", "body": body, "more_body": True}

    request = Request({"type": "http", "headers": [(b"content-type", kind.encode())]}, receive)
    with pytest.raises(ProblemError, match="4000 bytes") as caught:
        anyio.run(read_upload, request, 4000, 1)
    assert caught.value.status == 413
    assert received == 5  # the fifth thousand is the first beyond the limit


def test_a_body_larger_than_it_says_is_413(small, problem):
    headers = {"Content-Length": "10"}
    assert "4000 bytes" in problem(small.post(URL, content=b"x" * 5000, headers=headers), 413)


def test_a_form_that_turns_out_too_large_is_413(small, problem):
    assert "4000 bytes" in problem(small.post(URL, files={"file": ("a", b"x" * 5000)}), 413)


def test_a_body_of_the_very_limit_is_read(small, problem):
    problem(small.post(URL, content=b"x" * 4000), 415)


@settings(max_examples=40, deadline=None)
@given(body=st.binary(max_size=300), start=st.sampled_from([b"", b"--b\r\n", b"--b\r\nContent-"]))
def test_no_form_breaks_the_service(client, body, start):
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = client.post(URL, content=start + body, headers=headers)
    assert 400 <= response.status_code < 500, response.text
