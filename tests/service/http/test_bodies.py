import asyncio
import base64
import gzip
import json
import tracemalloc
import zlib
from contextlib import suppress
from types import SimpleNamespace

import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.errors import ProblemError
from service.http import bodies
from service.http.bodies import BodyLimitMiddleware, read_body, read_upload

pytestmark = pytest.mark.anyio

URL = "/v1/detect"
CODINGS = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}


def ask(chunks: list[bytes], headers: dict[str, str], limit: int = 1000) -> bytes:
    """The body that `read_body` reads from a request that comes in these chunks."""
    messages = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    taken.clear()

    async def receive():
        taken.append(messages[len(taken)])
        return taken[-1]

    async def elsewhere(function, *arguments):
        return await asyncio.to_thread(function, *arguments)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
    return asyncio.run(read_body(request, limit, elsewhere))


taken: list[dict] = []


def test_reads_plain_bodies():
    assert ask([b"ab", b"", b"c"], {}) == b"abc"
    assert ask([b"abc"], {"content-encoding": "identity"}) == b"abc"
    assert ask([b"x" * 1000], {"content-length": "1000"}) == b"x" * 1000


@pytest.mark.parametrize("name", ["gzip", "GZIP", " gzip ", "x-gzip", "deflate", "identity, gzip"])
def test_reads_compressed_bodies(name):
    coding = name.lower().rpartition(",")[2].strip()
    whole = CODINGS[coding](b"content")
    assert ask([whole[:5], whole[5:]], {"content-encoding": name}) == b"content"


@pytest.mark.parametrize("name", ["br", "gzip, deflate", "gzip, gzip", "zstd", "x"])
def test_other_codings_are_refused_and_ours_are_named(name):
    with pytest.raises(ProblemError) as caught:
        ask([b"x"], {"content-encoding": name})
    assert caught.value.status == 415
    assert repr(name) in caught.value.detail
    assert caught.value.headers == {"Accept-Encoding": "gzip, deflate"}
    assert taken == []


def test_too_much_is_refused_before_it_is_read_where_it_is_promised():
    with pytest.raises(ProblemError) as caught:
        ask([b"x" * 1001], {"content-length": "1001"})
    assert caught.value.status == 413
    assert taken == []


@pytest.mark.parametrize("headers", [{}, {"content-length": "5"}, {"content-length": "-1"}])
def test_too_much_is_refused_as_it_comes_where_it_is_not(headers):
    with pytest.raises(ProblemError) as caught:
        ask([b"x" * 500] * 10, headers)
    assert caught.value.status == 413
    assert len(taken) == 3


def test_compressed_bytes_that_stand_for_nothing_are_counted_too():
    blocks = b"\x78\x01" + b"\x00\x00\x00\xff\xff" * 1000  # stored blocks of no bytes
    with pytest.raises(ProblemError) as caught:
        ask([blocks[at : at + 100] for at in range(0, 5000, 100)], {"content-encoding": "deflate"})
    assert caught.value.status == 413
    assert len(taken) == 11


# The bound on bytes and time of bodies that arrive.


class Sender:
    """A client that sends a body in pieces, the last only when `finish` is set."""

    def __init__(self, *pieces: bytes):
        self.pieces = list(pieces)
        self.finish = asyncio.Event()

    async def receive(self):
        if len(self.pieces) > 1:
            return {"type": "http.request", "body": self.pieces.pop(0), "more_body": True}
        await self.finish.wait()
        if self.pieces:
            return {"type": "http.request", "body": self.pieces.pop(), "more_body": False}
        return {"type": "http.disconnect"}


async def read_all(scope, receive, send):
    body = await read_body(Request(scope, receive), 10**6, asyncio.to_thread)
    await send({"type": "body", "body": body})


def limited(app=read_all, max_bytes=100, seconds=60.0):
    refused = []
    metrics = SimpleNamespace(rejected=refused.append)
    return BodyLimitMiddleware(app, max_bytes, seconds, metrics), refused


async def send_to(middleware, sender, *, finished=True, headers=()) -> bytes:
    sent = []

    async def send(message):
        sent.append(message["body"])

    if finished:
        sender.finish.set()
    scope = {"type": "http", "method": "POST", "headers": list(headers)}
    await middleware(scope, sender.receive, send)
    return sent[0]


async def test_all_bodies_together_are_bounded_and_a_body_alone_is_not():
    middleware, refused = limited()
    for _ in range(2):  # forgotten afterwards
        assert len(await send_to(middleware, Sender(b"x" * 90, b"y" * 90))) == 180
    slow = Sender(b"x" * 60, b"end")
    waiting = asyncio.create_task(send_to(middleware, slow, finished=False))
    await asyncio.sleep(0)
    with pytest.raises(ProblemError, match="60 bytes of bodies are held") as error:
        await send_to(middleware, Sender(b"y" * 41, b"end"))
    assert (error.value.status, error.value.headers) == (429, {"Retry-After": "1"})
    assert (refused, middleware.held) == (["bodies"], 60)
    assert await send_to(middleware, Sender(b"y" * 40)) == b"y" * 40
    slow.finish.set()
    assert await waiting == b"x" * 60 + b"end"
    assert middleware.held == 0


async def test_inflated_bytes_count_too():
    middleware, refused = limited()
    slow = asyncio.create_task(send_to(middleware, Sender(b"x", b"end"), finished=False))
    await asyncio.sleep(0)
    small = gzip.compress(b"y" * 500)
    with pytest.raises(ProblemError, match="at most 100"):
        await send_to(middleware, Sender(small), headers=[(b"content-encoding", b"gzip")])
    assert (refused, middleware.held) == (["bodies"], 1)
    slow.cancel()
    await asyncio.wait([slow])
    assert middleware.held == 0


async def test_a_body_that_does_not_arrive_is_408():
    middleware, refused = limited(seconds=0.01)
    with pytest.raises(ProblemError, match=r"within 0\.01 s") as error:
        async with asyncio.timeout(30):
            await send_to(middleware, Sender(b"x", b"never"), finished=False)
    assert error.value.status == 408
    assert (refused, middleware.held) == (["slow_body"], 0)


async def test_the_time_ends_with_the_body():
    """Waiting for the client to disconnect is not waiting for its body."""

    async def wait_for_the_end(scope, receive, send):
        await Request(scope, receive).body()
        message = await receive()
        await send({"type": "body", "body": message["type"].encode()})

    middleware, _ = limited(wait_for_the_end, seconds=0.05)
    sender = Sender(b"x")
    gone, receive = asyncio.Event(), sender.receive

    async def disconnect_late():
        if not sender.pieces:
            await gone.wait()
        return await receive()

    sender.receive = disconnect_late
    asyncio.get_running_loop().call_later(0.1, gone.set)
    assert await send_to(middleware, sender) == b"http.disconnect"


# Images, forms and JSON.


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


def test_a_body_beyond_the_limit_is_413_whatever_it_says(serve_with, problem):
    with serve_with(max_upload_bytes=4000) as client:
        for request in (
            {"content": b"x" * 5000, "headers": {"Content-Length": "10"}},
            {"files": {"file": ("a", b"x" * 5000)}},
        ):
            assert "4000 bytes" in problem(client.post(URL, **request), 413)
        problem(client.post(URL, content=b"x" * 4000), 415)  # the very limit is read


def as_json(**members: object) -> dict:
    return {"content": json.dumps(members), "headers": {"Content-Type": "application/json"}}


def text_of(png: bytes) -> str:
    return base64.b64encode(png).decode()


def found(response) -> list:
    assert response.status_code == 200, response.text
    return response.json()["detections"]


def test_json_of_images(client, png):
    expected = found(client.post(URL, content=png))
    text = text_of(png)
    lines = "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76))
    for image in (text, lines, "data:image/png;base64," + text):
        assert found(client.post(URL, **as_json(image=image))) == expected
    body = client.post(URL, **as_json(images=[text] * 2)).json()
    assert [result["detections"] for result in body["results"]] == [expected, expected]
    nulls = {"images": None, "threshold": None, "format": None}  # as good as left out
    assert found(client.post(URL, **as_json(image=text, **nulls))) == expected


def test_options_in_json_are_of_its_own_types(client, png):
    options = {"threshold": 0.1, "thresholds": {"red": 0.99}, "classes": ["red", "green"]}
    ours = found(client.post(URL, **as_json(image=text_of(png), **options, iou=0.3)))
    query = {"threshold": "0.1", "thresholds": '{"red": 0.99}', "classes": "red,green"}
    assert ours
    assert ours == found(client.post(URL, content=png, params=query | {"iou": "0.3"}))


def test_an_option_that_is_also_in_the_query_is_422(client, png, problem):
    form = {"files": {"file": png}, "data": {"iou": "0.5"}}
    for body in (as_json(image=text_of(png), iou=0.5), form):
        response = client.post(URL, **body, params={"iou": "0.6"})
        assert "'iou' is given twice" in problem(response, 422)


async def test_large_forms_and_json_are_parsed_in_a_thread_and_small_ones_are_not():
    form = form_body(b'Content-Disposition: form-data; name="file"; filename="a"\r\n\r\n%s')
    ran = []

    async def off_loop(function, *arguments):
        ran.append(function)
        return await asyncio.to_thread(function, *arguments)

    for size, threads in ((3000, 0), (300_000, 1)):
        for body, kind in (
            (form["content"] % (b"x" * size), form["headers"]["Content-Type"]),
            (b'{"image": "%s"}' % (b"AAA=" * (size // 4)), "application/json"),
        ):
            ran.clear()

            async def receive(body=body):
                return {"type": "http.request", "body": body, "more_body": False}

            headers = [(b"content-type", kind.encode())]
            request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
            with suppress(ProblemError):  # the base64 has padding in its middle
                await read_upload(request, 10**6, 1, off_loop)
            assert len(ran) == threads


def test_base64_full_of_white_space_takes_little_memory():
    text = " A" * 2**20
    tracemalloc.start()
    assert len(bodies._from_base64("image", text)) == 2**20 * 3 // 4
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * 2**20  # splitting at white space takes 50 bytes a letter


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
