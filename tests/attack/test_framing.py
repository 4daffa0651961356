"""Kind 1: what is no request of HTTP/1.1 gets one refusal at most, and ends its connection."""

import random
import ssl
import struct

import pytest

from tests.attack.core import END, cases, head

LIVE = b"GET /health/live HTTP/1.1"


def line(first: bytes) -> bytes:
    return head(first=first)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(
        incoming, outgoing, server_hostname="localhost"
    )
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


FIRST_LINES = {
    "HTTP/0.9": b"GET /health/live\r\n\r\n",
    "no version": line(b"GET /health/live"),
    "version 1.2": line(b"GET /health/live HTTP/1.2"),
    "version 2.0": line(b"GET /health/live HTTP/2.0"),
    "version 1": line(b"GET /health/live HTTP/1"),
    "version 1.10": line(b"GET /health/live HTTP/1.10"),
    "small letters of a version": line(b"GET /health/live http/1.1"),
    "word behind the version": line(LIVE + b" x"),
    "another protocol": line(b"GET /health/live RTSP/1.0"),
    "control byte in the path": line(b"GET /health\x01/live HTTP/1.1"),
    "NUL in the path": line(b"GET /health\0/live HTTP/1.1"),
    "space in the path": line(b"GET /health /live HTTP/1.1"),
    "path without a slash": line(b"GET health/live HTTP/1.1"),
    "no path": line(b"GET HTTP/1.1"),
    "NUL in the method": line(b"GE\0T /health/live HTTP/1.1"),
    "small letters of a method": line(b"get /health/live HTTP/1.1"),
    "method of punctuation": line(b"(){} /health/live HTTP/1.1"),
    "method without an end": b"G" * 10_000,
    "space in front": line(b" " + LIVE),
    "CR alone behind the line": LIVE + b"\rHost: x\r\n\r\n",
}
HEADERS = {
    "no Host": LIVE + b"\r\n\r\n",
    "two Hosts": head(b"Host: y", first=LIVE),
    "two equal Hosts": head(b"Host: x", first=LIVE),
    "space in a name": head(b"A b: c", first=LIVE),
    "space before a colon": head(b"A : c", first=LIVE),
    "no colon": head(b"abc", first=LIVE),
    "no name": head(b": c", first=LIVE),
    "NUL in a value": head(b"A: b\0c", first=LIVE),
    "CR in a value": head(b"A: b\rc", first=LIVE),
    "control byte in a name": head(b"A\x01: b", first=LIVE),
    "folded first line": LIVE + b"\r\n Host: x\r\n\r\n",
    "other letters in a name": head("Ä: b".encode(), first=LIVE),
}
PROTOCOLS = {
    "TLS": client_hello(),
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n",
    "SMTP": b"EHLO x\r\nMAIL FROM:<a@b>\r\n",
    "SOCKS": b"\x05\x01\x00",
    "PROXY protocol": b"PROXY TCP4 203.0.113.1 203.0.113.2 1 2\r\n" + head(first=LIVE),
    "PROXY protocol 2": b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\4" + bytes(5),
    "HTTP/2 frames": struct.pack(">I", 12)[1:] + b"\1\5" + struct.pack(">I", 1) + bytes(12),
    "DNS": struct.pack(">HHHHHHH", 31, 1, 256, 1, 0, 0, 0),
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "noise": random.Random(0).randbytes(10_000),
    "zeros": bytes(10_000),
    "LFs": b"\n" * 10_000 + b"x\r\n\r\n",
}
# Unusual, and right: answered, with what is behind it.
UNUSUAL = {
    "empty lines in front": (b"\r\n\r\n" + head(first=LIVE), [200, 200]),
    "absolute URL": (line(b"GET http://elsewhere/health/live HTTP/1.1"), [200, 200]),
    "query of punctuation": (line(b"GET /health/live?&&==%%%zz;;[] HTTP/1.1"), [200, 200]),
    "method that nobody knows": (line(b"PURGE /health/live HTTP/1.1"), [405, 200]),
    "TRACE": (line(b"TRACE /health/live HTTP/1.1"), [405, 200]),
    "path out of the root": (line(b"GET /static/../../../etc/passwd HTTP/1.1"), [404, 200]),
    "escaped path out of the root": (
        line(b"GET /static/..%2f..%2f..%2fetc%2fpasswd HTTP/1.1"),
        [404, 200],
    ),
    "double escape": (line(b"GET /static/%252e%252e%252fsettings.py HTTP/1.1"), [404, 200]),
    "escaped NUL": (line(b"GET /static/page.js%00.html HTTP/1.1"), [404, 200]),
    "path that is not UTF-8": (line(b"GET /v1/models/%ff%fe HTTP/1.1"), [404, 200]),
    "bad escape": (line(b"GET /v1/models/%zz HTTP/1.1"), [404, 200]),
    "backslashes": (line(b"GET /static/..\\..\\page.js HTTP/1.1"), [404, 200]),
    "empty value": (head(b"A:", first=LIVE), [200, 200]),
    "value that is not ASCII": (head(b"A: \xff\xfe", first=LIVE), [200, 200]),
    "Range, Early-Data, TE, Prefer": (
        head(b"Range: bytes=0-0", b"Early-Data: 1", b"TE: trailers", b"Prefer: x", first=LIVE),
        [200, 200],
    ),
    "Expect of something": (head(b"Expect: miracles", first=LIVE), "either"),
    "override of the method": (
        head(b"X-HTTP-Method-Override: DELETE", first=b"GET /v1/models HTTP/1.1"),
        [200, 200],
    ),
    "headers that rewrite": (
        head(b"X-Original-URL: /metrics", b"X-Rewrite-URL: /metrics", first=b"GET /nil HTTP/1.1"),
        [404, 200],
    ),
}


@pytest.mark.parametrize("data", cases(1, FIRST_LINES | HEADERS | PROTOCOLS))
def test_what_is_no_request_is_refused_once(service, data):
    answers = service.exchange(data + END)
    assert [answer for answer in answers if answer.status < 400] == []
    assert len(answers) <= 1
    service.lives()


@pytest.mark.parametrize(("data", "expected"), cases(1, UNUSUAL))
def test_unusual_requests_are_answered(service, data, expected):
    statuses = [answer.status for answer in service.exchange(data + END)]
    assert statuses == expected or (expected == "either" and statuses[-1] in (200, 417))
    service.lives()
