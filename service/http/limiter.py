"""Token buckets per client, in memory that all workers share.

The `limits` package counts within one process, or in a Redis: without a Redis, N workers would
allow N times the rate. A file of buckets in shared memory keeps one rate over all workers.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from ipaddress import ip_address, ip_network
from struct import Struct
from time import monotonic

from starlette.types import Scope

from service.core.worker_files import WorkerFiles, allocate

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
        name: Name of the file that workers share, if there are several.
        clock: Monotonic seconds, the same for all workers.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        name: str,
        sets: int = SETS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._sets = sets
        self._clock = clock
        size = sets * WAYS * _BUCKET.size
        files = WorkerFiles.of_environment()
        if files is None:
            self._file, self._memory = None, mmap.mmap(-1, size)
        else:
            self._file = (files.folder / name).open("a+b")
            allocate(self._file, size)  # a new file is all zeros; each worker asks for one size
            self._memory = mmap.mmap(self._file.fileno(), size)

    def wait(self, client: str, *, take: bool = True) -> float:
        """Take one token from a client's bucket.

        Args:
            client: Any text.
            take: False only looks whether there is one.

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
            bucket = (digest, left - 1 if allowed and take else left, now)
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


def client_network(scope: Scope) -> str:
    """The client's address, or the /64 of an IPv6 address: one client has all of these."""
    client = scope.get("client")
    return _network(str(client[0])) if client else "unknown"


@lru_cache(maxsize=4096)
def _network(address: str) -> str:
    try:
        parsed = ip_address(address)
    except ValueError:
        return address
    if parsed.version == 4:
        return address
    return str(parsed.ipv4_mapped or ip_network((parsed, 64), strict=False))
