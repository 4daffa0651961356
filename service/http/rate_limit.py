"""A token bucket per client, in memory that all workers share.

The `limits` package counts within one process, or in a Redis: without a Redis, N workers would
allow N times the rate. A file of buckets in shared memory keeps one rate over all workers.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from struct import Struct
from time import monotonic

from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import problem_response
from service.core.settings import Settings
from service.core.worker_files import WorkerFiles
from service.http.auth import is_public
from service.observability.metrics import Metrics

# A bucket: the client's digest, what is left in it, and when that was.
_BUCKET = Struct("=8sdd")

# A client's bucket is in one of `SETS` sets of `WAYS`; a full set forgets the client seen least
# recently, which starts afresh. 16,384 clients take 384 KiB, however many there are.
SETS, WAYS = 2048, 8


class Limiter:
    """Token buckets in memory of a fixed size.

    Args:
        rate: Tokens added per second.
        burst: Capacity of a bucket.
        file: The file that workers share; None for memory of this process.
        clock: Monotonic seconds, the same for all workers.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        file: Path | None = None,
        sets: int = SETS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._sets = sets
        self._clock = clock
        size = sets * WAYS * _BUCKET.size
        if file is None:
            self._file, self._memory = None, mmap.mmap(-1, size)
        else:
            self._file = file.open("a+b")
            self._file.truncate(size)  # a new file is all zeros; each worker asks for one size
            self._memory = mmap.mmap(self._file.fileno(), size)

    def wait(self, client: str) -> float:
        """Take one token from a client's bucket.

        Returns:
            0 if there was a token; otherwise the seconds until there is one, and none is taken.
        """
        digest = blake2b(client.encode(errors="replace"), digest_size=8).digest()
        start = int.from_bytes(digest, "big") % self._sets * WAYS * _BUCKET.size
        stop = start + WAYS * _BUCKET.size
        with self._locked():
            now = self._clock()
            buckets = list(_BUCKET.iter_unpack(self._memory[start:stop]))
            index = next((i for i, bucket in enumerate(buckets) if bucket[0] == digest), None)
            left = self._burst
            if index is None:
                index = min(range(WAYS), key=lambda i: buckets[i][2])
            else:
                _, before, since = buckets[index]
                left = min(left, before + (now - since) * self._rate)
            allowed = left >= 1
            bucket = (digest, left - 1 if allowed else left, now)
            _BUCKET.pack_into(self._memory, start + index * _BUCKET.size, *bucket)
        return 0.0 if allowed else (1 - left) / self._rate

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude other workers. The kernel releases the lock of a worker that is killed."""
        if self._file is None:
            yield
            return
        import fcntl  # not on Windows, where there is one process only

        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


class RateLimitMiddleware:
    """Refuses requests beyond the rate with 429 and `Retry-After`, before their body is read.

    Clients are told apart by the name of their token, or by address where there are no tokens.
    Public paths are not limited.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        files = WorkerFiles.of_environment()
        file = files.folder / "rates" if files else None
        self.limiter = Limiter(settings.rate_limit, settings.rate_burst, file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or is_public(scope["path"], self.settings):
            await self.app(scope, receive, send)
            return
        client = scope["state"].get("token") or client_address(scope)
        seconds = self.limiter.wait(client)
        if seconds == 0:
            await self.app(scope, receive, send)
            return
        self.metrics.rejected("rate_limit")
        detail = (
            f"more than {self.settings.rate_limit:g} requests a second; ask again in"
            f" {seconds:.3g} seconds"
        )
        headers = {"Retry-After": str(math.ceil(seconds))}
        await problem_response(429, detail, headers)(scope, receive, send)


def client_address(scope: Scope) -> str:
    """The client's address without the port; `unknown` for a socket without addresses."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"
