"""Requests that would cost more than they may: refused over HTTP, for little memory."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import base64, gzip, json, sys, zlib
from pathlib import Path
from starlette.testclient import TestClient
from service.app import create_app
from service.core.settings import Settings

def kilobytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

pixels = b"\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\rIHDR" + (20_000).to_bytes(4, "big") * 2
pixels += bytes([8, 2, 0, 0, 0]) + bytes(40)
zeros = b"\\0" * 2**20
inflating = zlib.compressobj(9, zlib.DEFLATED, 31)
gzipped = b"".join([inflating.compress(zeros) for _ in range(1024)]) + inflating.flush()
nested = b"[" * 1020 + b"]" * 1020
texts = {
    "nested text": {"thresholds": "[" * 10**4},
}
extra = b"".join(b',"o%d":1' % n for n in range(10**6)) + b"}"

def many(value):
    return json.dumps({"image": "eA==", "thresholds": value}).encode()

form = {"Content-Type": "multipart/form-data; boundary=b"}
as_json = {"Content-Type": "application/json"}
zipped = {"Content-Encoding": "gzip"}

part = b'--b\\r\\nContent-Disposition: form-data; name="x"\\r\\n'
requests = {
    "pixels": (413, pixels, {}),
    "gzip": (413, gzipped, zipped),
    "gzip of a form": (413, gzipped, zipped | form),
    "gzip of JSON": (413, gzipped, zipped | as_json),
    "a lie about the length": (413, zeros, {"Content-Length": str(2**40)}),
    "nesting": (400, b"[" * 10**5, as_json),
    "nested image": (400, b'{"image":' * 10**5, as_json),
    "nested option": (422, b'{"image":"eA==","classes":' + nested + b"}", as_json),
    "a million thresholds": (400, many({f"c{n}": 2 for n in range(10**6)}), as_json),
    "a million entries": (400, many([2] * 10**6), as_json),
    "a long name": (422, many("x" * 10**7), as_json),
    "a million options": (400, many(0)[:-1] + extra, as_json),
    "nested text": (422, b"", {}),
    "header of a part": (400, part + b"x: " + b"y" * 2**20, form),
    "headers of a part": (400, part + b"x: y\\r\\n" * 10**5, form),
    "parts": (400, (part + b"\\r\\n\\r\\n") * 10**4, form),
    "images": (400, json.dumps({"images": ["eA=="] * 10**5}).encode(), as_json),
}
app = create_app(Settings(model=Path(sys.argv[1]), threads=1, provider="cpu", log_level="error"))
with TestClient(app) as client:
    while client.get("/health/ready").status_code != 200:
        pass
    client.post("/v1/detect", content=b"x")
    for name, (status, body, headers) in requests.items():
        params = texts.get(name, {})
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
        before = kilobytes("VmRSS")
        got = client.post("/v1/detect", content=body, headers=headers, params=params)
        print(name, status, got.status_code, kilobytes("VmHWM") - before, sep="|")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bombs_are_refused_and_take_less_than_50_megabytes(detector: Path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(detector)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == 17
    assert [row for row in rows if row[1] != row[2]] == []
    assert [row for row in rows if int(row[3]) > 50 * 1024] == []
