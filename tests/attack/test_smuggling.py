"""Kind 1: one request, one answer. Each shape hides a request in another one's body or framing."""

import pytest

from tests.attack.core import END, cases, head

INNER = b"GET /v1/models/smuggled HTTP/1.1\r\nHost: inner\r\n\r\n"
SIZE = b"%d" % len(INNER)
CHUNKED = b"Transfer-Encoding: chunked"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(INNER), INNER)
OFFER = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQ")
WEBSOCKET = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: AAAA")

REFUSED = "refused"  # one answer of 4xx or 5xx at most, and the connection is closed
ANSWERED = [415, 200]  # the body is no image; the honest request behind it is answered
EITHER = "either"  # of those


def sized(*lines: bytes, body: bytes = INNER) -> bytes:
    return head(*lines, b"Content-Length: %d" % len(body)) + body


def length(value: bytes) -> bytes:
    return head(b"Content-Length:" + value) + INNER


def coding(*lines: bytes) -> bytes:
    return head(*lines) + CHUNKS


def chunked(data: bytes) -> bytes:
    return head(CHUNKED) + data


UPGRADES = {
    "offer of HTTP/2": (sized(*OFFER), ANSWERED),
    "offer of HTTP/2 and chunks": (coding(*OFFER, CHUNKED), ANSWERED),
    "offer of a WebSocket": (sized(*WEBSOCKET), ANSWERED),
    "offer without Connection": (sized(b"Upgrade: h2c"), ANSWERED),
    "offer of TLS": (sized(b"Connection: upgrade", b"Upgrade: TLS/1.0"), ANSWERED),
    "offer of nothing": (sized(b"Connection: upgrade", b"Upgrade:"), ANSWERED),
    "two offers": (sized(*OFFER, *WEBSOCKET), ANSWERED),
    "Connection: upgrade alone": (sized(b"Connection: upgrade"), ANSWERED),
    "offer in a GET": (head(*OFFER, first=b"GET /health/live HTTP/1.1"), [200, 200]),
    "offer in a GET with a body": (
        head(*OFFER, b"Content-Length: " + SIZE, first=b"GET /health/live HTTP/1.1") + INNER,
        [200, 200],
    ),
    "offer that expects to continue": (sized(*OFFER, b"Expect: 100-continue"), ANSWERED),
    "HTTP/2 without an offer": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + INNER, REFUSED),
    "CONNECT": (head(first=b"CONNECT inner:80 HTTP/1.1", host=b"inner:80") + INNER, REFUSED),
}
LENGTHS = {
    "two lengths": (head(b"Content-Length: 0", b"Content-Length: " + SIZE) + INNER, REFUSED),
    "two lengths in one": (length(b" 0, " + SIZE), REFUSED),
    "two equal lengths": (head(*[b"Content-Length: " + SIZE] * 2) + INNER, EITHER),
    "length with a plus": (length(b" +0"), REFUSED),
    "negative length": (length(b" -1"), REFUSED),
    "hexadecimal length": (length(b" 0x31"), REFUSED),
    "length with a space": (length(b" 4 9"), REFUSED),
    "length with an exponent": (length(b" 49e0"), REFUSED),
    "empty length": (length(b""), REFUSED),
    "length beyond 64 bits": (length(b" 18446744073709551665"), REFUSED),
    "length in other digits": (length(" ٤٩".encode()), REFUSED),
    "length with a space before the colon": (head(b"Content-Length : " + SIZE) + INNER, REFUSED),
    "length in a folded line": (head(b"Content-Length:", b" " + SIZE) + INNER, EITHER),
}
CODINGS = {
    "length and chunks": (coding(b"Content-Length: " + SIZE, CHUNKED), REFUSED),
    "chunks and length": (coding(CHUNKED, b"Content-Length: 5"), REFUSED),
    "gzip, chunked": (coding(b"Transfer-Encoding: gzip, chunked"), REFUSED),
    "chunked, gzip": (coding(b"Transfer-Encoding: chunked, gzip"), REFUSED),
    "chunked, identity": (coding(b"Transfer-Encoding: chunked, identity"), REFUSED),
    "identity": (coding(b"Transfer-Encoding: identity"), REFUSED),
    "chunked twice": (coding(CHUNKED, CHUNKED), REFUSED),
    "chunked and something": (coding(CHUNKED, b"Transfer-Encoding: x"), REFUSED),
    "chunked in quotes": (coding(b'Transfer-Encoding: "chunked"'), REFUSED),
    "chunked with a parameter": (coding(CHUNKED + b";a=b"), REFUSED),
    "xchunked": (coding(b"Transfer-Encoding: xchunked"), REFUSED),
    "vertical tab before chunked": (coding(b"Transfer-Encoding: \x0bchunked"), REFUSED),
    "NUL behind chunked": (coding(CHUNKED + b"\0"), REFUSED),
    "space before the colon": (coding(b"Transfer-Encoding : chunked"), REFUSED),
    "folded value": (coding(b"Transfer-Encoding:", b" chunked"), REFUSED),
    "empty coding": (coding(b"Transfer-Encoding:"), REFUSED),
    "capitals": (coding(b"TRANSFER-ENCODING: CHUNKED"), ANSWERED),
    "chunks in HTTP/1.0": (
        head(CHUNKED, b"Connection: keep-alive", first=b"POST /v1/detect HTTP/1.0") + CHUNKS,
        REFUSED,
    ),
    "line that ends in LF alone": (head(b"A: b\nTransfer-Encoding: chunked") + CHUNKS, REFUSED),
    "line that ends in CR alone": (head(b"A: b\rTransfer-Encoding: chunked") + CHUNKS, REFUSED),
}
CHUNK = b"%x" % len(INNER)
SIZES = {
    "prefix of a size": chunked(b"0x" + CHUNKS),
    "sign of a size": chunked(b"+" + CHUNKS),
    "negative size": chunked(b"-1\r\n" + INNER),
    "size beyond 64 bits": chunked(b"1" + b"0" * 14 + CHUNKS),
    "size without digits": chunked(b"\r\n" + INNER + b"\r\n0\r\n\r\n"),
    "size with a space in front": chunked(b" " + CHUNKS),
    "LF alone behind a size": chunked(CHUNK + b"\n" + INNER + b"\r\n0\r\n\r\n"),
    "LF inside an extension": chunked(CHUNK + b";a=\n" + INNER + b"\r\n0\r\n\r\n"),
    "CR inside an extension": chunked(CHUNK + b";a\rb\r\n" + INNER + b"\r\n0\r\n\r\n"),
    "chunk longer than its size": chunked(b"5\r\n" + INNER + b"\r\n0\r\n\r\n"),
    "chunk without an end": chunked(CHUNK + b"\r\n" + INNER + b"0\r\n\r\n"),
    "LF alone behind a chunk": chunked(CHUNK + b"\r\n" + INNER + b"\n0\r\n\r\n"),
    "trailer that is no header": chunked(b"0\r\n" + INNER.replace(b"\r\n\r\n", b"\r\n") + b"\r\n"),
}
TRAILERS = {
    "length in a trailer": chunked(CHUNKS[:-2] + b"Content-Length: 50\r\n\r\n"),
    "coding in a trailer": chunked(CHUNKS[:-2] + CHUNKED + b"\r\n\r\n"),
    "host in a trailer": chunked(CHUNKS[:-2] + b"Host: inner\r\n\r\n"),
    "extension of a size": chunked(CHUNK + b';a="b"\r\n' + INNER + b"\r\n0;c\r\n\r\n"),
}


def check(service, data: bytes, expected: object) -> None:
    before = service.log().count("smuggled")
    answers = service.exchange(data + END)
    statuses = [answer.status for answer in answers if answer.status >= 200]
    refused = len(statuses) <= 1 and all(status >= 400 for status in statuses)
    if expected == REFUSED:
        assert refused, statuses
    elif expected == ANSWERED or isinstance(expected, list):
        assert statuses == expected
    else:
        assert refused or statuses == ANSWERED
    assert service.log().count("smuggled") == before  # its path would be in the access log
    assert service.process.poll() is None


@pytest.mark.parametrize(("data", "expected"), cases(1, UPGRADES | LENGTHS | CODINGS))
def test_a_body_is_never_read_as_a_request(service, data, expected):
    check(service, data, expected)


@pytest.mark.parametrize("data", cases(1, SIZES))
def test_a_malformed_chunk_ends_the_connection(service, data):
    check(service, data, REFUSED)


@pytest.mark.parametrize("data", cases(1, TRAILERS))
def test_trailers_and_extensions_are_no_headers(service, data):
    check(service, data, EITHER)


@pytest.mark.parametrize("data", cases(1, {name: UPGRADES[name][0] for name in list(UPGRADES)[:3]}))
def test_workers_do_not_read_a_body_as_a_request(workers, data):
    check(workers, data, ANSWERED)
