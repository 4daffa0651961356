"""How often one client may ask: a token bucket each, in memory that workers share."""

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
from service.http.access import client_address
from service.http.auth import RejectionObserver, is_public

# A bucket: the client's digest, what is left in it, and when that was.
_BUCKET = Struct("=8sdd")

# A client has its place in one of `SETS`, beside others of the same; where one is full, the longest
# unseen of it is forgotten, and starts afresh. 16,384 clients in 384 KiB, however many there are.
SETS, WAYS = 2048, 8


class Limiter:
    """A bucket a client, which a request takes one from and time fills.

    Args:
        rate: What time adds, a second.
        burst: What a bucket holds.
        file: Where workers keep their buckets together; memory of this process where None.
        sets: How many sets of `WAYS` buckets there are.
        clock: Seconds that only rise, the same for all workers.
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
            self._file.truncate(size)  # to the same size by each; zeros where it is new
            self._memory = mmap.mmap(self._file.fileno(), size)

    def wait(self, client: str) -> float:
        """Take one from a client's bucket.

        Returns:
            0 where there was one to take; else the seconds until there will be, and nothing is
            taken.
        """
        digest = blake2b(client.encode(errors="replace"), digest_size=8).digest()
        start = int.from_bytes(digest, "big") % self._sets * WAYS * _BUCKET.size
        stop = start + WAYS * _BUCKET.size
        with self._alone():
            now = self._clock()
            buckets = list(_BUCKET.iter_unpack(self._memory[start:stop]))
            place = next((i for i, one in enumerate(buckets) if one[0] == digest), None)
            left = self._burst
            if place is None:
                place = min(range(WAYS), key=lambda i: buckets[i][2])
            else:
                _, before, since = buckets[place]
                left = min(left, before + (now - since) * self._rate)
            allowed = left >= 1
            bucket = (digest, left - 1 if allowed else left, now)
            _BUCKET.pack_into(self._memory, start + place * _BUCKET.size, *bucket)
        return 0.0 if allowed else (1 - left) / self._rate

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else takes meanwhile. The lock of a worker that is killed falls with it."""
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
    """Refuses what comes too often, with 429, a `Retry-After`, and before a body is read.

    Who asks is the name of the token, or the address where there are no tokens, over all workers
    together. What would need no token is not limited.

    Args:
        app: What answers.
        settings: The rate and the burst.
        observer: Told of refusals.
    """

    def __init__(self, app: ASGIApp, settings: Settings, observer: RejectionObserver) -> None:
        self.app = app
        self.settings = settings
        self.observer = observer
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
        self.observer.rejected("rate_limit")
        detail = (
            f"more than {self.settings.rate_limit:g} requests a second; ask again in"
            f" {seconds:.3g} seconds"
        )
        headers = {"Retry-After": str(math.ceil(seconds))}
        await problem_response(scope, 429, detail, headers)(scope, receive, send)
