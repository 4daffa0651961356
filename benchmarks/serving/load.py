"""Clients that ask a server as fast as it answers, each one request at a time.

Requests are made beforehand and answers are hardly looked at, so that the clients take as little
of the machine as they can.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from itertools import count

# Seconds without an answer after which a client gives up, and what stands for its status.
_PATIENCE = 10
NO_ANSWER = 0
BOUNDARY = "----------------benchmark"


@dataclass
class Load:
    """What the clients saw.

    Attributes:
        seconds: From the first request to the last answer.
        last: When that came, by `time.perf_counter`.
        milliseconds: Of each answer that was 200 and came in time.
        refused: Other answers by status; `NO_ANSWER` where none came.
    """

    seconds: float = 0.0
    last: float = 0.0
    milliseconds: list[float] = field(default_factory=list)
    refused: dict[int, int] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds

    def quantile(self, share: float) -> float:
        """The time that this share of the answers did not exceed."""
        ordered = sorted(self.milliseconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def form_request(path: str, field_name: str, content: bytes) -> bytes:
    """A request with an image in a form."""
    head = (
        f"--{BOUNDARY}\r\n"
        f'Content-Disposition: form-data; name="{field_name}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return _request(path, f"multipart/form-data; boundary={BOUNDARY}", body)


def raw_request(path: str, content: bytes) -> bytes:
    """A request that is an image."""
    return _request(path, "image/jpeg", content)


def _request(path: str, kind: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def ask(port: int, requests: list[bytes], clients: int, seconds: float) -> Load:
    """Let several clients ask for some seconds.

    Args:
        port: Where the server listens.
        requests: Sent in turn, over and over.
        clients: How many ask at a time, each over a connection of its own.
        seconds: For how long requests are begun.
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
    """Read one answer to its end; its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    start = lower.index(b"content-length:") + len(b"content-length:")
    length = int(lower[start : lower.index(b"\r\n", start)])
    await reader.readexactly(length)
    return int(head[9:12])
