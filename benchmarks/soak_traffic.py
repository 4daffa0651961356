"""Mixed good and hostile traffic for `benchmarks.soak`, in a process of its own.

    python -m benchmarks.soak_traffic --port 8000 --seconds 60 --images FOLDER --bombs FOLDER

Prints one JSON object at the end: what honest requests were answered, and what became of each
hostile shape. An honest request must be served, if need be after refusals for now (429, 503): a
closed connection, a silence of `PATIENCE` seconds or another status loses it. A second answer to
the same request must have the same detections as the first.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

PATIENCE = 60.0
STORM = 150  # connections
TRIES = 5  # of a request that is refused for now
FOR_NOW = (429, 503)
BOUNDARY = "soak-boundary"
OCTETS = "application/octet-stream"
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass
class Tally:
    """Outcomes of the traffic.

    Attributes:
        answers: Honest requests by the status of their last answer.
        retries: Refusals for now that were tried again.
        lost: Honest requests without an answer, or with an error of the service, by reason.
        wrong: Answers with other detections than before.
        hostile: Outcomes of each hostile shape.
    """

    answers: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    hostile: dict[str, Counter[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where requests go, and material for them."""

    port: int
    honest: list[bytes]
    bombs: list[tuple[str, bytes]]
    chance: random.Random


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Shape = Callable[[Place, Stream], Awaitable[str]]


def request(body: bytes, content_type: str, path: str = "/v1/detect", **headers: str) -> bytes:
    """Build a POST; underscores in names of headers are hyphens."""
    named = {"Host": "localhost", "Content-Type": content_type, **headers}
    if "Transfer_Encoding" not in named:
        named["Content-Length"] = str(len(body))
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items()]
    return f"POST {path} HTTP/1.1\r\n{''.join(lines)}\r\n".encode() + body


def form(*images: bytes) -> bytes:
    """Build a POST of images in a form."""
    name = "file" if len(images) == 1 else "files"
    parts = [
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; name={name}; filename=x\r\n\r\n".encode()
        + image
        + b"\r\n"
        for image in images
    ]
    body = b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()
    return request(body, f"multipart/form-data; boundary={BOUNDARY}")


def honest_requests(images: list[bytes]) -> list[bytes]:
    """Build each image's requests: plain, in a form, in JSON, compressed and in chunks."""
    made = []
    for image in images:
        text = json.dumps({"image": base64.b64encode(image).decode(), "threshold": 0.3}).encode()
        half = len(image) // 2
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in (image[:half], image[half:], b""))
        made += [
            request(image, OCTETS),
            form(image),
            form(image, images[0]),
            request(text, "application/json"),
            request(gzip.compress(image), OCTETS, Content_Encoding="gzip"),
            request(chunks, OCTETS, Transfer_Encoding="chunked"),
            request(image, OCTETS, "/v1/detect?format=image"),
        ]
    return made


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read one answer with a Content-Length; return status and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
    return int(head[9:12]), await reader.readexactly(int(length or 0))


async def client(place: Place, tally: Tally, known: dict[bytes, Any], end: float) -> None:
    """Send honest requests over connections of a few each, and retry as told, until the end."""
    while monotonic() < end:
        stream = await asyncio.open_connection("127.0.0.1", place.port)
        try:
            for _ in range(place.chance.randrange(1, 6)):
                sent = place.chance.choice(place.honest)
                status, body = await _ask(place, tally, stream, sent)
                _note(tally, known, sent, status, body)
        except (OSError, EOFError, TimeoutError) as error:
            tally.lost[type(error).__name__] += 1
        finally:
            stream[1].close()
        await asyncio.sleep(place.chance.expovariate(4.0))


async def _ask(place: Place, tally: Tally, stream: Stream, sent: bytes) -> tuple[int, bytes]:
    for _ in range(TRIES):
        stream[1].write(sent)
        status, body = await asyncio.wait_for(read_answer(stream[0]), PATIENCE)
        if status not in FOR_NOW:
            break
        tally.retries += 1
        await asyncio.sleep(place.chance.uniform(0.5, 1.5))
    return status, body


def _note(tally: Tally, known: dict[bytes, Any], sent: bytes, status: int, body: bytes) -> None:
    tally.answers[str(status)] += 1
    if status != 200 and status not in FOR_NOW:
        tally.lost[f"{status}: {body[:200].decode(errors='replace')}"] += 1
    if status == 200 and body.startswith(b"{"):
        found = json.loads(body)
        found = found.get("detections", found.get("results"))
        tally.wrong += known.setdefault(sent, found) != found


async def until_closed(stream: Stream) -> str:
    """Read to the end; return the statuses of the answers, or `closed` without any."""
    received = await stream[0].read()
    statuses = [part[:3].decode() for part in received.split(b"HTTP/1.1 ")[1:]]
    return " ".join(dict.fromkeys(statuses)) or "closed"


async def slow_body(place: Place, stream: Stream) -> str:
    """Send some bytes of a body a second, and leave."""
    _, writer = stream
    writer.write(request(b"", "image/jpeg")[:-5] + b"99999\r\n\r\n")
    for _ in range(place.chance.randrange(5, 20)):
        writer.write(place.chance.randbytes(10))
        await writer.drain()
        await asyncio.sleep(1)
    return "left"


async def half_headers(_: Place, stream: Stream) -> str:
    """Send half of the headers and wait."""
    stream[1].write(LIVE[:-2] + b"X-Half: ")
    return await until_closed(stream)


async def large_headers(place: Place, stream: Stream) -> str:
    """Send a header, or a URL, that is too large."""
    start = place.chance.choice((LIVE[:-2] + b"X-Large: ", b"GET /"))
    stream[1].write(start + b"x" * place.chance.randrange(70_000, 500_000))
    return await until_closed(stream)


async def bomb(place: Place, stream: Stream) -> str:
    """Send a file that must be refused; its name begins with the status."""
    reader, writer = stream
    name, content = place.chance.choice(place.bombs)
    plain = place.chance.random() < 0.5
    writer.write(request(content, OCTETS) if plain else form(content))
    status, _ = await read_answer(reader)
    expected = name.startswith(str(status)) or status in FOR_NOW
    return "refused" if expected else f"{name}: {status}"


async def disconnect(place: Place, stream: Stream) -> str:
    """Send a request, or a part of it, and reset the connection."""
    _, writer = stream
    sent = place.chance.choice(place.honest)
    writer.write(sent if place.chance.random() < 0.5 else sent[: place.chance.randrange(len(sent))])
    await writer.drain()
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
    return "left"


async def pipeline(_: Place, stream: Stream) -> str:
    """Send ten requests at once, which are answered in order."""
    reader, writer = stream
    writer.write(LIVE * 10)
    statuses = [(await read_answer(reader))[0] for _ in range(10)]
    return " ".join(map(str, dict.fromkeys(statuses)))


async def flood(_: Place, stream: Stream) -> str:
    """Send a thousand requests at once, and read only then."""
    stream[1].write(LIVE * 1000)
    await asyncio.sleep(2)
    stream[1].write_eof()
    return await until_closed(stream)


async def garbage(place: Place, stream: Stream) -> str:
    """Send bytes that are no HTTP, or whose framing is ambiguous."""
    smuggled = b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"
    shapes = (
        place.chance.randbytes(200) + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00" + place.chance.randbytes(500),
        b"GET /health/live\r\n\r\n",
        LIVE[:-2].replace(b"GET /health/live", b"POST /v1/detect") + smuggled,
    )
    stream[1].write(place.chance.choice(shapes))
    stream[1].write_eof()
    return await until_closed(stream)


async def slow_reader(place: Place, stream: Stream) -> str:
    """Ask for an answer and do not read it for some time."""
    _, writer = stream
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(place.chance.choice(place.honest))
    await asyncio.sleep(place.chance.uniform(1, 40))
    return "left"


async def idle(_: Place, stream: Stream) -> str:
    """Say nothing."""
    return await until_closed(stream)


async def many_parts(_: Place, stream: Stream) -> str:
    """Send a compressed form of very many parts."""
    part = f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n".encode()
    kind = f"multipart/form-data; boundary={BOUNDARY}"
    stream[1].write(request(gzip.compress(part * 20_000), kind, Content_Encoding="gzip"))
    return str((await read_answer(stream[0]))[0])


async def storm(place: Place, stream: Stream) -> str:
    """Send from very many connections at once, and repeat at once whatever is answered."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(3):
            writer.write(sent)
            statuses.append((await read_answer(reader))[0])

    sent, statuses = place.chance.choice(place.honest), list[int]()
    opened = [await asyncio.open_connection("127.0.0.1", place.port) for _ in range(STORM)]
    try:
        await asyncio.gather(one(*stream), *(one(*each) for each in opened))
    finally:
        for _, writer in opened:
            writer.close()
    await asyncio.sleep(place.chance.uniform(5, 25))
    return " ".join(map(str, sorted(set(statuses))))


SHAPES: dict[str, Shape] = {
    shape.__name__: shape
    for shape in (
        *(slow_body, half_headers, large_headers, bomb, disconnect, pipeline, flood, garbage),
        *(slow_reader, idle, many_parts, storm),
    )
}


async def attacker(place: Place, tally: Tally, name: str, end: float) -> None:
    """Repeat a hostile shape until the end."""
    outcomes = tally.hostile.setdefault(name, Counter())
    while monotonic() < end:
        try:
            stream = await asyncio.open_connection("127.0.0.1", place.port)
            try:
                outcome = await asyncio.wait_for(SHAPES[name](place, stream), 2 * PATIENCE)
            finally:
                stream[1].close()
        except (OSError, EOFError, TimeoutError) as error:
            outcome = type(error).__name__
        outcomes[outcome] += 1
        await asyncio.sleep(place.chance.expovariate(1.0))


async def traffic(place: Place, seconds: float, clients: int, attackers: int) -> Tally:
    """Run honest clients and attackers of every shape for some seconds."""
    known: dict[bytes, Any] = {}
    tally, end = Tally(), monotonic() + seconds
    hostile = [
        asyncio.create_task(attacker(place, tally, name, end))
        for name in SHAPES
        for _ in range(attackers)
    ]
    await asyncio.gather(*(client(place, tally, known, end) for _ in range(clients)))
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)
    return tally


def main() -> None:
    """Send, and print the outcomes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="honest files")
    parser.add_argument("--bombs", type=Path, nargs="+", required=True, help="named by status")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--attackers", type=int, default=1, help="of each shape")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    place = Place(
        given.port,
        honest_requests([path.read_bytes() for path in given.images]),
        [(path.name, path.read_bytes()) for path in given.bombs],
        random.Random(given.seed),  # noqa: S311  not for security
    )
    tally = asyncio.run(traffic(place, given.seconds, given.clients, given.attackers))
    json.dump(vars(tally), sys.stdout)


if __name__ == "__main__":
    main()
