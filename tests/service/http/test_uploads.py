import base64
import gzip
import json
import zlib

import anyio
import pytest
from anyio import to_thread
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from service.app import create_app
from service.core.errors import ProblemError
from service.http.uploads import read_upload

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
        ({"files": [("files", (f"{i}", png)) for i in range(17)]}, "Maximum number of files is 16"),
    ]
    for request, message in cases:
        assert message in problem(client.post(URL, **request), 400), request


@pytest.mark.parametrize(
    "kind", ["application/jsonl", "application/x-www-form-urlencoded", "text/plain"]
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
        anyio.run(read_upload, request, 4000, 1, to_thread.run_sync)
    assert caught.value.status == 413
    assert received == 5  # the fifth thousand is the first beyond the limit


def test_a_body_larger_than_it_says_is_413(small, problem):
    headers = {"Content-Length": "10"}
    assert "4000 bytes" in problem(small.post(URL, content=b"x" * 5000, headers=headers), 413)


def test_a_form_that_turns_out_too_large_is_413(small, problem):
    assert "4000 bytes" in problem(small.post(URL, files={"file": ("a", b"x" * 5000)}), 413)


def test_a_body_of_the_very_limit_is_read(small, problem):
    problem(small.post(URL, content=b"x" * 4000), 415)


def as_json(**members: object) -> dict:
    return {"content": json.dumps(members), "headers": {"Content-Type": "application/json"}}


def text_of(png: bytes) -> str:
    return base64.b64encode(png).decode()


def found(response) -> list:
    assert response.status_code == 200, response.text
    return response.json()["detections"]


def test_json_with_one_image_is_one_object(client, png):
    expected = found(client.post(URL, content=png))
    text = text_of(png)
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for image in (text, lines, "data:image/png;base64," + text):
        assert found(client.post(URL, **as_json(image=image))) == expected


def test_json_with_images_is_a_list(client, png):
    expected = found(client.post(URL, content=png))
    body = client.post(URL, **as_json(images=[text_of(png)] * 2)).json()
    assert [result["detections"] for result in body["results"]] == [expected, expected]


def test_options_in_json_are_of_its_own_types(client, png):
    options = {"threshold": 0.1, "thresholds": {"red": 0.99}, "classes": ["red", "green"]}
    ours = found(client.post(URL, **as_json(image=text_of(png), **options, iou=0.3)))
    query = {"threshold": "0.1", "thresholds": '{"red": 0.99}', "classes": "red,green"}
    assert ours
    assert ours == found(client.post(URL, content=png, params=query | {"iou": "0.3"}))


def test_null_is_as_good_as_left_out(client, png):
    body = as_json(image=text_of(png), images=None, threshold=None, format=None)
    assert found(client.post(URL, **body)) == found(client.post(URL, content=png))


def test_an_option_in_json_and_query_is_422(client, png, problem):
    response = client.post(URL, **as_json(image=text_of(png), iou=0.5), params={"iou": "0.6"})
    assert "'iou' is given twice" in problem(response, 422)


def test_a_form_of_too_many_or_too_long_fields_is_400(client, png, problem):
    files = {"file": ("a.png", png)}
    many = client.post(URL, files=files, data={f"o{place}": "1" for place in range(33)})
    assert "Maximum number of fields is 32" in problem(many, 400)
    long = client.post(URL, files=files, data={"classes": "x" * (64 * 1024 + 1)})
    assert "maximum size of 64KB" in problem(long, 400)


@pytest.mark.parametrize("option", ["threshold", "iou", "max_detections"])
def test_true_is_no_number(client, png, option, problem):
    detail = problem(client.post(URL, **as_json(image=text_of(png), **{option: True})), 422)
    assert f"{option} is True" in detail


def test_malformed_json_is_400(client, png, problem):
    image = text_of(png)
    cases = [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 10_000 + "]" * 10_000, "not JSON"),
        ('{"image":' * 10_000 + "1" + "}" * 10_000, "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "more than 20000 values"),
        ('{"image":' * 100_000 + "1" + "}" * 100_000, "more than 20000 values"),
        ("[]", "must be a JSON object"),
        ("{}", "either `image` or `images`"),
        (json.dumps({"image": image, "images": [image]}), "either `image` or `images`"),
        (json.dumps({"image": 5}), "image is 5, and not base64"),
        (json.dumps({"image": "%%%"}), "image is not base64"),
        (json.dumps({"image": "\u20ac"}), "image is not base64"),
        (json.dumps({"image": image[:-1]}), "image is not base64"),
        (json.dumps({"images": image}), "`images` must be a list"),
        (json.dumps({"images": []}), "`images` must be a list of base64, and not empty"),
        (json.dumps({"images": [image, None]}), "images[1] is None, and not base64"),
        (json.dumps({"images": [image] * 17}), "17 images; at most 16"),
        (json.dumps({"image": ""}), "image: the image is empty"),
    ]
    for content, message in cases:
        headers = {"Content-Type": "application/json; charset=utf-8"}
        response = client.post(URL, content=content, headers=headers)
        assert message in problem(response, 400), content[:50]


@pytest.mark.parametrize(
    ("coding", "squeeze"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies_of_every_kind(client, png, coding, squeeze):
    expected = found(client.post(URL, content=png))
    boundary = {"Content-Type": "multipart/form-data; boundary=b"}
    head = b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    form = form_body(head + png)["content"]
    sent = as_json(image=text_of(png))
    bodies = [(png, {}), (form, boundary), (sent["content"].encode(), sent["headers"])]
    for body, headers in bodies:
        headers = headers | {"Content-Encoding": coding}
        assert found(client.post(URL, content=squeeze(body), headers=headers)) == expected


def test_another_coding_is_415(client, png, problem):
    response = client.post(URL, content=png, headers={"Content-Encoding": "br"})
    assert "'br'" in problem(response, 415)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["image", "images", "thresholds", "threshold", "classes", "image_ids"]
                ),
                inner,
                max_size=3,
            )
        ),
        max_leaves=6,
    )
)
def test_no_json_breaks_the_service(client, body):
    response = client.post(URL, **as_json(**body) if isinstance(body, dict) else as_json(x=body))
    assert response.status_code in (400, 415, 422), response.text
