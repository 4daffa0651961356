"""Closed-loop clients, each with one request at a time.

Requests are prepared in advance and answers barely parsed, to keep the clients cheap.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import count

# Seconds after which a client gives up, and the status recorded then.
_PATIENCE = 10
NO_ANSWER = 0
BOUNDARY = "----------------benchmark"


@dataclass
class Load:
    """Measurements of the clients.

    Attributes:
        seconds: Time from the first request to the last answer.
        last: Time of the last answer, by `time.perf_counter`.
        milliseconds: Latency of each 200 answer.
        refused: Number of other answers by status; `NO_ANSWER` for none in time.
    """

    seconds: float = 0.0
    last: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Answers per second."""
        return len(self.milliseconds) / self.seconds

    def quantile(self, share: float) -> float:
        """Quantile of the latency."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def form_request(path: str, field_name: str, content: bytes) -> bytes:
    """Make a request with an image in a form."""
    head = (
        f"--{BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{field_name}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return _request(path, f"multipart/form-data; boundary={BOUNDARY}", body)


def raw_request(path: str, content: bytes) -> bytes:
    """Make a request whose body is an image."""
    return _request(path, "image/jpeg", content)


def _request(path: str, kind: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    """Run several clients for some seconds.

    Args:
        port: Port of the server.
        requests: Requests, sent in turn and repeated.
        clients: Number of clients, each with its own connection.
        seconds: Time during which requests start.
    """
    return asyncio.run(_ask(port, requests, clients, seconds))


async def _ask(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    load, places, started = Load(), count(), time.perf_counter()
    end = started + seconds
    await asyncio.gather(*(_client(port, requests, places, end, load) for _ in range(clients)))
    load.seconds = load.last - started
    return load


async def _client(
    port: int, requests: list[bytes], places: count[int], end: float, load: Load
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while (began := time.perf_counter()) < end:
            writer.write(requests[next(places) % len(requests)])
            try:
                status = await asyncio.wait_for(_read_answer(reader), _PATIENCE)
            except TimeoutError:
                load.refused[NO_ANSWER] = load.refused.get(NO_ANSWER, 0) + 1
                return
            if status == 200:
                load.last = time.perf_counter()
                load.milliseconds.append((load.last - began) * 1000)
            else:
                load.refused[status] = load.refused.get(status, 0) + 1
    finally:
        writer.close()


async def _read_answer(reader: asyncio.StreamReader) -> int:
    """Read one answer completely and return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    start = lower.index(b"content-length:") + len(b"content-length:")
    length = int(lower[start : lower.index(b"\r\n", start)])
    await reader.readexactly(length)
    return int(head[9:12])
