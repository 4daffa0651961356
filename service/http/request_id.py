"""A name for every request, and the last resort for errors that nobody expected."""

from __future__ import annotations

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import problem_response

logger = logging.getLogger("ghm.service")

HEADER = "X-Request-ID"

# A name that a client gives goes into the log and back, so it must be short and harmless.
_HARMLESS = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestIdMiddleware:
    """Gives each request an id, the client's own where it sent a harmless one.

    The id is in the answer's `X-Request-ID`, in every problem, and in the log beside each
    unexpected error, which the client sees as a 500 without its insides.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _HARMLESS.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_named(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except ClientDisconnect:
            logger.info("request %s: the client went away before it had sent all", request_id)
        except Exception:
            logger.exception("request %s: %s %s failed", request_id, scope["method"], scope["path"])
            if started:  # half an answer is out; cutting the connection is all that is left
                raise
            detail = "the service failed; its log has the reason beside the request_id"
            await problem_response(scope, 500, detail)(scope, receive, send_named)
