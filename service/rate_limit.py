"""How often one client may ask: a token bucket each."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from time import monotonic

from starlette.types import ASGIApp, Receive, Scope, Send

from service.access import client_address
from service.auth import RejectionObserver, is_public
from service.problems import problem_response
from service.settings import Settings

# Clients remembered at a time. The longest unseen is forgotten first, and starts afresh.
MOST_CLIENTS = 10_000


class Limiter:
    """A bucket a client, which a request takes one from and time fills.

    Args:
        rate: What time adds, a second.
        burst: What a bucket holds.
        most: Buckets remembered.
        clock: Seconds that only rise.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        most: int = MOST_CLIENTS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._most = most
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Take one from a client's bucket.

        Returns:
            0 where there was one to take; else the seconds until there will be, and nothing is
            taken.
        """
        now = self._clock()
        left, since = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        allowed = left >= 1
        self._buckets[client] = (left - 1 if allowed else left, now)
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) / self._rate

    def __len__(self) -> int:
        return len(self._buckets)


class RateLimitMiddleware:
    """Refuses what comes too often, with 429, a `Retry-After`, and before a body is read.

    Who asks is the name of the token, or the address where there are no tokens. What needs no token
    is not limited. Each worker counts what comes to it, so its share of `rate_limit` is a part of
    as many as there are workers.

    Args:
        app: What answers.
        settings: The rate, the burst and the workers.
        observer: Told of refusals.
    """

    def __init__(self, app: ASGIApp, settings: Settings, observer: RejectionObserver) -> None:
        self.app = app
        self.settings = settings
        self.observer = observer
        self.limiter = Limiter(settings.rate_limit, settings.rate_burst)

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
