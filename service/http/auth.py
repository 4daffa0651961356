"""Bearer tokens (RFC 6750), several, each with a name for the log.

Without tokens the service is open to everybody who can reach it. With them, every request needs
`Authorization: Bearer TOKEN`, except for

- `/`, `/static`, `/docs` and `/openapi.json`: they hold nothing but the API itself, and
  a browser cannot send a token before it has a page that asks for one;
- `/health` and `/v2/health`, unless `public_health` is off: orchestrators send no tokens;
- `/metrics`, if `public_metrics` is on: metrics show what is detected, so they are private by
  default.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from starlette._utils import get_route_path  # the same path that routes match
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import problem_response
from service.core.settings import Settings, SettingsError
from service.http.limiter import Limiter, client_network
from service.observability import logs
from service.observability.metrics import Metrics

logger = logging.getLogger("ghm.service")

# Seconds between checks of the tokens file for changes.
CHECK_SECONDS = 1.0

# Wrong tokens from an address before they are slowed down.
GUESSES = 20
_MOST_KNOWN = 4096

# RFC 6750's b64token, and the names that a log line can carry.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

_PAGES = ("/", "/docs", "/openapi.json", "/favicon.ico")


@dataclass(frozen=True)
class Token:
    """The name and the SHA-256 of a token. The token itself is not kept."""

    name: str
    digest: bytes


def parse_tokens(entries: Iterable[str], source: str) -> list[Token]:
    """Parse tokens written as `name:token` or `token`, which is named `token-1` by its position.

    Args:
        entries: One token each; empty entries and comments (`#`) are skipped.
        source: Where the entries come from, for error messages.

    Raises:
        SettingsError: A name or a token has characters that are not allowed, or two names share a
            token. The message names the position, never the token.
    """
    tokens: dict[bytes, Token] = {}
    texts = (text for text in map(str.strip, entries) if text and not text.startswith("#"))
    for position, text in enumerate(texts, start=1):
        name, separator, value = (part.strip() for part in text.partition(":"))
        if not separator:
            name, value = f"token-{position}", text
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{source}: the name of token {position} may have letters, digits and . _ -, at"
                " most 64 of them"
            )
        if not _TOKEN.fullmatch(value):
            raise SettingsError(
                f"{source}: token {position} ({name}) is empty or has characters that no bearer"
                " token has: letters, digits and . _ ~ + / - are allowed, and = at the end"
            )
        token = Token(name, _digest(value))
        if token.digest in tokens:
            raise SettingsError(
                f"{source}: {tokens[token.digest].name} and {name} are the same token"
            )
        tokens[token.digest] = token
    return list(tokens.values())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


class TokenStore:
    """The tokens in force, from the settings and from a file that is read again when it changes.

    Attributes:
        required: Whether requests need a token.

    Raises:
        SettingsError: A token is malformed, or the file cannot be read or holds none.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        entries = settings.tokens.get_secret_value().split(",") if settings.tokens else []
        self._from_settings = parse_tokens(entries, "GHM_TOKENS")
        self._file = settings.tokens_file
        self._signature: tuple[int, int, int] | None = None
        self._from_file: list[Token] = []
        self._checked = clock()
        if self._file:
            try:
                self._from_file = self._read(self._file)
            except OSError as error:
                raise SettingsError(f"tokens_file {self._file}: {error.strerror}") from error
        self.required = settings.tokens is not None or self._file is not None
        if self.required and not self._from_settings and not self._from_file:
            where = self._file or "GHM_TOKENS"
            raise SettingsError(f"{where} holds no token, so every request would be refused")

    def find(self, presented: str) -> Token | None:
        """Return the token that a client presents, or None if it is unknown.

        The time taken does not depend on which token matches, or how closely.
        """
        self._refresh()
        digest = _digest(presented)
        match = None
        for token in (*self._from_settings, *self._from_file):
            if hmac.compare_digest(token.digest, digest):
                match = token
        return match

    def _refresh(self) -> None:
        """Read the file again if it has changed. A damaged file leaves the tokens as they were."""
        if self._file is None or self._clock() - self._checked < CHECK_SECONDS:
            return
        self._checked = self._clock()
        try:
            if _signature(self._file) == self._signature:
                return
            self._from_file = self._read(self._file)
            logger.info("read %d tokens from %s", len(self._from_file), self._file)
        except (OSError, SettingsError) as error:
            logger.error("the tokens stay as they were: %s", error)

    def _read(self, path: Path) -> list[Token]:
        # Taken first: a change during the read is then seen at the next check.
        self._signature = _signature(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: not UTF-8 text") from error
        return parse_tokens(text.splitlines(), str(path))


def _signature(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_public(path: str, settings: Settings) -> bool:
    """Whether a path is answered without a token."""
    if path in _PAGES or path.startswith("/static/"):
        return True
    if path.startswith(("/health/", "/v2/health/")):
        return settings.public_health
    return path == "/metrics" and settings.public_metrics


class AuthMiddleware:
    """Refuses requests without a valid token with 401, before their body is read.

    The name of the token is put into the scope's state as `token`, and into the log. After
    `GUESSES` wrong tokens from an address, further tokens from it are compared once a second; those
    that were right before still pass.
    """

    def __init__(
        self, app: ASGIApp, store: TokenStore, settings: Settings, metrics: Metrics
    ) -> None:
        self.app = app
        self.store = store
        self.settings = settings
        self.metrics = metrics
        self.guesses = Limiter(1.0, GUESSES, "guesses")
        self._known: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or is_public(get_route_path(scope), self.settings):
            await self.app(scope, receive, send)
            return
        header = Headers(scope=scope).get("authorization", "")
        scheme, _, presented = header.partition(" ")
        is_bearer = scheme.lower() == "bearer"
        token = self.store.find(presented.strip()) if is_bearer else None
        client = client_network(scope)
        known = token is not None and (client, token.digest) in self._known
        seconds = 0.0 if known or not is_bearer else self.guesses.wait(client, take=token is None)
        if seconds > 0:
            self.metrics.rejected("guesses")
            detail = f"too many unknown tokens; ask again in {seconds:.3g} seconds"
            headers = {"Retry-After": str(math.ceil(seconds))}
            await problem_response(429, detail, headers)(scope, receive, send)
            return
        if token is not None:
            self._remember(client, token)
            scope["state"]["token"] = token.name
            logs.note(token=token.name)
            await self.app(scope, receive, send)
            return
        self.metrics.rejected("unauthorized")
        detail = "this token is not known" if is_bearer else "send `Authorization: Bearer TOKEN`"
        challenge = 'Bearer realm="ghm"' + (', error="invalid_token"' if is_bearer else "")
        response = problem_response(401, detail, {"WWW-Authenticate": challenge})
        await response(scope, receive, send)

    def _remember(self, client: str, token: Token) -> None:
        self._known[client, token.digest] = None
        self._known.move_to_end((client, token.digest))
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
