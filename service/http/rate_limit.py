"""A rate of requests per client."""

from __future__ import annotations

import math

from starlette._utils import get_route_path  # the same path that routes match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import problem_response
from service.core.settings import Settings
from service.http.auth import is_public
from service.http.limiter import Limiter, client_network
from service.observability.metrics import Metrics


class RateLimitMiddleware:
    """Refuses requests beyond the rate with 429 and `Retry-After`, before their body is read.

    Clients are told apart by the name of their token, or by address where there are no tokens; an
    IPv6 network of 64 bits is one client.
    Public paths are not limited.
    """

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self.limiter = Limiter(settings.rate_limit, settings.rate_burst, "rates")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or is_public(get_route_path(scope), self.settings):
            await self.app(scope, receive, send)
            return
        client = scope["state"].get("token") or client_network(scope)
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
