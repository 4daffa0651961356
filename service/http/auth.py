"""Who may ask: bearer tokens (RFC 6750), several, each with a name for the log.

Without tokens the service is open to whoever can reach it. With them, every request needs
`Authorization: Bearer TOKEN` but those for

- `/`, `/static`, `/docs`, `/redoc` and `/openapi.json`: they hold nothing but the API itself, and
  a browser cannot send a token before it has a page to ask for one;
- `/health` and `/v2/health`, unless `public_health` is off: orchestrators send no tokens;
- `/metrics`, where `public_metrics` is on: they tell what is detected, so they are not public
  unless somebody says so.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.core.errors import problem_response
from service.core.settings import Settings, SettingsError
from service.observability import logs

logger = logging.getLogger("ghm.service")

# A file of tokens is looked at this often, in seconds: not at every request.
LOOK_AGAIN = 1.0

# What a header can carry as a token (RFC 6750's b64token), and what a log can carry as a name.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")

_PAGES = ("/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/favicon.ico")


@dataclass(frozen=True)
class Token:
    """A token's name, and its SHA-256: the token itself is not kept."""

    name: str
    digest: bytes


class RejectionObserver(Protocol):
    """Whoever counts refusals: the metrics."""

    def rejected(self, reason: str) -> None:
        """A request has been refused."""


def parse_tokens(entries: Iterable[str], source: str) -> list[Token]:
    """Tokens, each written as `name:token` or `token`.

    Args:
        entries: One token each; empty ones and comments (`#`) are passed over.
        source: Where they stand, for errors.

    Returns:
        The tokens. One without a name is called after its place, `token-1` and so on.

    Raises:
        SettingsError: A name or a token has signs that cannot be, or two names share a token. The
            message names the place, never the token.
    """
    tokens: dict[bytes, Token] = {}
    places = (text for text in map(str.strip, entries) if text and not text.startswith("#"))
    for place, text in enumerate(places, start=1):
        name, separator, value = text.partition(":")
        if not separator:
            name, value = f"token-{place}", text
        name, value = name.strip(), value.strip()
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{source}: the name of token {place} may have letters, digits and . _ -, at most"
                " 64 of them"
            )
        if not _TOKEN.fullmatch(value):
            raise SettingsError(
                f"{source}: token {place} ({name}) is empty or has signs that no bearer token has:"
                " letters, digits and . _ ~ + / - are allowed, and = at the end"
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
    """The tokens in force.

    Args:
        settings: `tokens` and `tokens_file`.
        clock: Seconds that only rise.

    Raises:
        SettingsError: A token cannot be, or the file cannot be read or holds none.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        given = settings.tokens.get_secret_value().split(",") if settings.tokens else []
        self._given = parse_tokens(given, "GHM_TOKENS")
        self._file = settings.tokens_file
        self._signature: tuple[int, int, int] | None = None
        self._from_file: list[Token] = []
        self._looked = clock()
        if self._file:
            try:
                self._from_file = self._read(self._file)
            except OSError as error:
                raise SettingsError(f"tokens_file {self._file}: {error.strerror}") from error
        self.required = settings.tokens is not None or self._file is not None
        if self.required and not self._given and not self._from_file:
            where = self._file or "GHM_TOKENS"
            raise SettingsError(f"{where} holds no token, so nobody could ask for anything")

    def find(self, presented: str) -> Token | None:
        """The token that a client presents; None where it is none of ours.

        Takes as long for a token that is nearly right, or the first, as for any other.
        """
        self._look()
        digest = _digest(presented)
        found = None
        for token in (*self._given, *self._from_file):
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found

    def _look(self) -> None:
        """Read the file again if it has changed."""
        if self._file is None or self._clock() - self._looked < LOOK_AGAIN:
            return
        self._looked = self._clock()
        try:
            if _signature(self._file) == self._signature:
                return
            self._from_file = self._read(self._file)
            logger.info("read %d tokens from %s", len(self._from_file), self._file)
        except (OSError, SettingsError) as error:
            logger.error("the tokens stay as they were: %s", error)

    def _read(self, path: Path) -> list[Token]:
        # Taken first: a change while reading is then seen the next time.
        self._signature = _signature(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: not UTF-8 text") from error
        return parse_tokens(text.splitlines(), str(path))


def _signature(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


def is_public(path: str, settings: Settings) -> bool:
    """Whether a path is answered without a token."""
    if path in _PAGES or path.startswith("/static/"):
        return True
    if path.startswith(("/health/", "/v2/health/")):
        return settings.public_health
    return path == "/metrics" and settings.public_metrics


class AuthMiddleware:
    """Refuses requests without a token that is ours, with 401 and before their body is read.

    The name of the token that was used is in the scope's state as `token`, and in the log.

    Args:
        app: What answers.
        store: The tokens.
        settings: What is public.
        observer: Told of refusals.
    """

    def __init__(
        self, app: ASGIApp, store: TokenStore, settings: Settings, observer: RejectionObserver
    ) -> None:
        self.app = app
        self.store = store
        self.settings = settings
        self.observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or is_public(scope["path"], self.settings):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, presented = given.partition(" ")
        named = scheme.lower() == "bearer"
        token = self.store.find(presented.strip()) if named else None
        if token is None:
            self.observer.rejected("unauthorized")
            await _refusal(scope, named)(scope, receive, send)
            return
        scope["state"]["token"] = token.name
        logs.note(token=token.name)
        await self.app(scope, receive, send)


def _refusal(scope: Scope, presented: bool) -> ASGIApp:
    detail = "this token is not known" if presented else "send `Authorization: Bearer TOKEN`"
    challenge = 'Bearer realm="ghm"' + (', error="invalid_token"' if presented else "")
    return problem_response(scope, 401, detail, {"WWW-Authenticate": challenge})
