"""Kind 3: bodies that are small to send and long to parse, beside honest requests."""

import base64
import gzip
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.attack.core import MIB, PATIENCE, Canary, cases, head, parse_answers

FORM = b"Content-Type: multipart/form-data; boundary=b"
JSON = b"Content-Type: application/json"
RAW = b"Content-Type: application/octet-stream"
GZIP = b"Content-Encoding: gzip"
CONNECTIONS = 4  # that send the same at once
MEMORY = 192 * MIB  # for all of them: a body may have 20 MiB, and is copied


def part(name: bytes, content: bytes, more: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (
        name,
        more,
        content,
    )


FILE = part(b"file", b"x", b'; filename="a"')
CLOSE = b"--b--\r\n"


def text(value: object) -> Callable[[], bytes]:
    return lambda: json.dumps(value).encode()


def zipped(make: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: gzip.compress(make(), 9, mtime=0)


def spaced(word: bytes, mebibytes: int) -> Callable[[], bytes]:
    return lambda: b'{"image": "' + word * (mebibytes * MIB // len(word)) + b'"}'


Shape = tuple[tuple[bytes, ...], Callable[[], bytes]]
FORMS: dict[str, Shape] = {
    "many parts": ((FORM,), lambda: part(b"a", b"") * 20_000 + CLOSE),
    "many parts, zipped": ((FORM, GZIP), zipped(lambda: part(b"a", b"") * 150_000 + CLOSE)),
    "many files, zipped": ((FORM, GZIP), zipped(lambda: FILE * 150_000 + CLOSE)),
    "parts of nothing, zipped": (
        (FORM, GZIP),
        zipped(lambda: b"--b\r\n\r\n\r\n" * 800_000 + CLOSE),
    ),
    "boundaries alone, zipped": ((FORM, GZIP), zipped(lambda: b"--b\r\n" * 2_000_000 + CLOSE)),
    "beginnings of boundaries": ((FORM,), lambda: FILE[:-3] + b"\r\n--" * 2_000_000 + CLOSE),
    "CRs in a file": ((FORM,), lambda: FILE[:-3] + b"\r" * 8 * MIB + b"\r\n" + CLOSE),
    "LFs in a file": ((FORM,), lambda: FILE[:-3] + b"\n" * 8 * MIB + b"\r\n" + CLOSE),
    "ends of lines in a file": ((FORM,), lambda: FILE[:-2] + b"\r\n" * 8 * MIB + CLOSE),
    "preamble without an end": ((FORM,), lambda: b"-" * 8 * MIB),
    "epilogue": ((FORM,), lambda: FILE + CLOSE + b"-" * 8 * MIB),
    "one header of a part": (
        (FORM,),
        lambda: part(b"file", b"x", b'; filename="' + b"a" * 8 * MIB + b'"') + CLOSE,
    ),
    "many headers of a part": ((FORM,), lambda: b"--b\r\n" + b"A: b\r\n" * 500_000 + CLOSE),
    "many parameters of a part": (
        (FORM,),
        lambda: part(b"file", b"x", b"; a=b" * 200_000) + CLOSE,
    ),
    "escapes in a file name": (
        (FORM,),
        lambda: part(b"file", b"x", b"; filename*=UTF-8''" + b"%41" * 500_000) + CLOSE,
    ),
    "quotes in a file name": (
        (FORM,),
        lambda: part(b"file", b"x", b'; filename="' + b'\\"' * 500_000) + CLOSE,
    ),
    "one value of an option": ((FORM,), lambda: part(b"iou", b"0" * 8 * MIB) + FILE + CLOSE),
    "thresholds in a form": (
        (FORM,),
        lambda: part(b"thresholds", b"[" * 60_000) + FILE + CLOSE,
    ),
    "boundary of punctuation": (
        (b"Content-Type: multipart/form-data; boundary=" + b"'" * 70,),
        lambda: (b"--" + b"'" * 69) * 100_000,
    ),
    "boundary with a thousand parameters": (
        (b"Content-Type: multipart/form-data; " + b'a="b"; ' * 5000 + b"boundary=b",),
        lambda: FILE + CLOSE,
    ),
}
DOCUMENTS: dict[str, Shape] = {
    "base64 of spaces": ((JSON,), spaced(b"AAA ", 12)),
    "base64 of spaces, zipped": ((JSON, GZIP), zipped(spaced(b"A ", 19))),
    "images of spaces, zipped": (
        (JSON, GZIP),
        zipped(text({"images": [" " * MIB] * 16})),
    ),
    "base64 of nothing but spaces": ((JSON,), text({"image": " " * 8 * MIB})),
    "base64 of other letters": ((JSON,), text({"image": "é" * 2 * MIB})),
    "base64 with one wrong sign": ((JSON,), text({"image": "A" * 8 * MIB + "*"})),
    "base64 of pads": ((JSON,), text({"image": "=" * 8 * MIB})),
    "escapes of characters": ((JSON,), lambda: b'{"image": "' + b"\\u0041" * 2 * MIB + b'"}'),
    "depth": ((JSON,), lambda: b"[" * 10_000 + b"]" * 10_000),
    "depth of objects": ((JSON,), lambda: b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "many values": ((JSON,), text({"image": "eA==", "classes": ["a"] * 3_000_000})),
    "many names": ((JSON,), text({f"o{number}": 1 for number in range(300_000)})),
    "one name many times": ((JSON,), lambda: b'{"image":1' + b',"image":1' * 500_000 + b"}"),
    "digits of a number": ((JSON,), lambda: b'{"iou": ' + b"1" * 8 * MIB + b"}"),
    "digits of a fraction": ((JSON,), lambda: b'{"iou": 0.' + b"3" * 8 * MIB + b"}"),
    "exponent": ((JSON,), lambda: b'{"image": "eA==", "iou": 1e999999999}'),
    "white space": ((JSON,), lambda: b"{" + b" " * 8 * MIB + b"}"),
    "text without an end": ((JSON,), lambda: b'{"image": "' + b"a" * 8 * MIB),
    "long thresholds": (
        (JSON,),
        text({"image": "eA==", "thresholds": {f"c{number}": 0.5 for number in range(19_000)}}),
    ),
    "name of an option": ((JSON,), text({"image": "eA==", "o" * 8 * MIB: 1})),
    "data URL of commas": ((JSON,), text({"image": "data:" + "," * 15_000 + "eA=="})),
    "NaN and infinity": ((JSON,), lambda: b'{"image": "eA==", "iou": NaN, "threshold": -Infinity}'),
}
STREAMS: dict[str, Shape] = {
    "gigabyte of zeros": ((RAW, GZIP), lambda: zeros(64)),
    "empty blocks": ((RAW, GZIP), lambda: empty_blocks(2_000_000)),
    "many members": ((RAW, GZIP), lambda: gzip.compress(b"") * 200_000),
    "gzip in gzip": ((RAW, GZIP), lambda: gzip.compress(zeros(64), mtime=0)),
    "two codings": ((RAW, GZIP, GZIP), lambda: gzip.compress(zeros(4))),
    "coding that nobody reads": ((RAW, b"Content-Encoding: br"), lambda: b"a" * MIB),
    "zeros in a v2 tensor": (
        (b"Inference-Header-Content-Length: 10", RAW, GZIP),
        lambda: zeros(64),
    ),
}


def zeros(mebibytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(bytes(MIB)) for _ in range(mebibytes)]) + packer.flush()


def empty_blocks(number: int) -> bytes:
    """A gzip stream of stored blocks of no bytes, and no end."""
    return gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * number


@pytest.mark.parametrize(("headers", "make"), cases(3, FORMS | DOCUMENTS | STREAMS))
def test_a_body_keeps_nobody_waiting(service, png, headers, make):
    body = make()
    path = b"/v2/models/colours/infer" if any(b"Inference" in h for h in headers) else b"/v1/detect"
    request = head(
        *headers,
        b"Content-Length: %d" % len(body),
        b"Connection: close",
        first=b"POST " + path + b" HTTP/1.1",
    )
    with service.grows_at_most(MEMORY), Canary(service), ThreadPoolExecutor(CONNECTIONS) as pool:
        sent = [pool.submit(service.send, request + body) for _ in range(CONNECTIONS)]
        service.detects(png)
        for received in sent:
            [answer] = parse_answers(received.result(PATIENCE))
            assert answer.status in (400, 413, 415, 422, 429, 431), answer
            assert len(answer.body) < 2000
    service.lives()


def test_many_options_of_a_query_keep_nobody_waiting(service, png):
    query = "&".join(f"threshold{number}=1" for number in range(3000))
    with Canary(service):
        answer = service.ask(f"/v1/detect?{query}", png, Content_Type="image/png")
    assert answer.status == 422
    assert len(answer.body) < 2000


def test_honest_base64_with_line_breaks_is_read(service, png):
    body = json.dumps({"image": base64.encodebytes(png).decode()}).encode()
    answer = service.ask("/v1/detect", body, Content_Type="application/json")
    assert len(answer.json()["detections"]) == 3
