"""Logging to stderr: one JSON object per line for machines, or one line of text for people.

All loggers share one handler, uvicorn's included. A record made during a request has the request's
id. Headers, query strings and bodies are not logged, so neither are tokens and images.

structlog needs as much configuration, and takes twice as long per line.
"""

from __future__ import annotations

import logging
import logging.config
import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TextIO

import orjson

Format = Literal["json", "text"]

# Facts about the current request. Tasks and threads copy the context, but share the dictionary.
_request: ContextVar[dict[str, Any] | None] = ContextVar("ghm_request", default=None)


def begin_request(request_id: str) -> dict[str, Any]:
    """Start to gather the facts for the access line of a request.

    Returns:
        The facts, to which `note` adds while the request runs.
    """
    notes: dict[str, Any] = {"request_id": request_id}
    _request.set(notes)
    return notes


def note(**facts: str | int | float) -> None:
    """Add facts to the access line of the current request, if there is one.

    Integers of the same name are summed, for requests with several parts; other values are
    replaced.
    """
    notes = _request.get()
    if notes is None:
        return
    for name, value in facts.items():
        before = notes.get(name, 0)
        counted = isinstance(value, int) and isinstance(before, int)
        notes[name] = before + value if counted else value


def configure(level: str, kind: Format) -> None:
    """Send all loggers of the process to one handler on stderr.

    Args:
        level: Level of the service's and uvicorn's loggers; others log warnings and above.
        kind: `json` or `text`.
    """
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"lines": {"()": JsonFormatter if kind == "json" else TextFormatter}},
            "handlers": {
                "stderr": {
                    "class": "logging.StreamHandler",
                    "formatter": "lines",
                    "stream": _stderr(),
                }
            },
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {name: {"level": level.upper()} for name in ("ghm", "uvicorn")},
        }
    )
    logging.getLogger("uvicorn.access").disabled = True  # service.http logs more
    logging.captureWarnings(capture=True)


class _Pipe:
    """A pipe or socket that drops lines while its reader does not keep up, instead of blocking.

    Args:
        send: Writes bytes without blocking and returns their number; raises `BlockingIOError`
            where there is no room.
    """

    def __init__(self, send: Callable[[bytes], int]) -> None:
        self._send = send
        self._rest = b""  # of a line that is written in part

    def write(self, text: str) -> None:
        """Write a line, or nothing."""
        self._rest = self._write(self._rest)
        if not self._rest:
            line = text.encode(errors="backslashreplace")
            rest = self._write(line)
            self._rest = rest if len(rest) < len(line) else b""

    def _write(self, data: bytes) -> bytes:
        """Write what the pipe takes, and return the rest."""
        try:
            return data[self._send(data) :]
        except BlockingIOError:
            return data

    def flush(self) -> None:
        """Do nothing: what is left waits for room in the pipe."""


def _stderr() -> TextIO | _Pipe:
    """Return stderr, or an object that writes to it without blocking if it is a pipe or socket.

    `O_NONBLOCK` would hold for every process that shares it. So a pipe is opened a second time.
    """
    try:
        descriptor = sys.stderr.fileno()
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(mode):
            stream = socket.socket(fileno=os.dup(descriptor))
            return _Pipe(lambda data: stream.send(data, socket.MSG_DONTWAIT))
        if stat.S_ISFIFO(mode):
            try:
                again = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK)
            except PermissionError:  # a pipe of another user
                return _Pipe(partial(_write_if_room, descriptor))
            return _Pipe(partial(os.write, again))
    except (OSError, AttributeError):  # not a file, or not on Linux
        pass
    return sys.stderr


def _write_if_room(descriptor: int, data: bytes) -> int:
    """Write to a pipe that has room for `PIPE_BUF` bytes, of which a write does not block."""
    if not select.select([], [descriptor], [], 0)[1]:
        raise BlockingIOError
    return os.write(descriptor, data[: select.PIPE_BUF])


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object: `ts`, `level`, `logger`, `pid`, `msg`, and its facts.

    `ts` is UTC in ISO 8601 to the millisecond. A traceback is the text `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, without a line feed."""
        line: dict[str, Any] = {
            "ts": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": record.process,
            "msg": record.getMessage(),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return _json(line)


class TextFormatter(logging.Formatter):
    """Formats a record as text: time, level, logger, message, and facts as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, and the lines of a traceback."""
        facts = "".join(f" {name}={_bare(value)}" for name, value in _facts(record).items())
        text = (
            f"{_utc(record.created)} {record.levelname.lower():<8} {record.name}:"
            f" {_one_line(record.getMessage())}{facts}"
        )
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """Return the record's `extra={"facts": ...}`, or the id of its request."""
    facts: dict[str, Any] | None = getattr(record, "facts", None)
    if facts is not None:
        return facts
    notes = _request.get()
    return {"request_id": notes["request_id"]} if notes else {}


def _utc(created: float) -> str:
    moment = datetime.fromtimestamp(created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=str).decode()
    except orjson.JSONEncodeError:  # half of a surrogate pair, from a path that is not UTF-8
        return orjson.dumps({name: ascii(value) for name, value in line.items()}).decode()


def _bare(value: object) -> str:
    """Return a fact as text, quoted unless it is plain."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="}
    return text if plain and text else ascii(text)


def _one_line(text: str) -> str:
    """Escape characters that could look like another line, or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
