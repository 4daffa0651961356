"""The log: a JSON object a line for machines, or a line of text for people, on stderr.

Every logger goes through it, uvicorn's too. A record made while a request is answered carries the
request's id. Nothing here looks at headers, query strings or bodies, so neither tokens nor images
can get into the log.
"""

from __future__ import annotations

import logging
import logging.config
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

import orjson

Format = Literal["json", "text"]

# What is known of the request that this code runs for. One dictionary from the beginning to the
# end of a request: tasks and threads get a copy of the context, but share the dictionary.
_request: ContextVar[dict[str, Any] | None] = ContextVar("ghm_request", default=None)


def begin_request(request_id: str) -> dict[str, Any]:
    """Start gathering what the access line of a request says.

    Returns:
        What `note` has gathered, filled in as the request goes on.
    """
    notes: dict[str, Any] = {"request_id": request_id}
    _request.set(notes)
    return notes


def note(**facts: str | int | float) -> None:
    """Add to the access line of the request that is being answered; outside of one, nothing.

    Counts add up over a request with several parts; names of the last part stay.
    """
    notes = _request.get()
    if notes is None:
        return
    for name, value in facts.items():
        before = notes.get(name, 0)
        counted = isinstance(value, int) and isinstance(before, int)
        notes[name] = before + value if counted else value


def configure(level: str, kind: Format) -> None:
    """Send every logger of the process through one handler on stderr.

    Args:
        level: The least level that the service's and uvicorn's own loggers show; others' loggers
            show warnings and worse.
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
                    "stream": "ext://sys.stderr",
                }
            },
            "root": {"level": "WARNING", "handlers": ["stderr"]},
            "loggers": {name: {"level": level.upper()} for name in ("ghm", "uvicorn")},
        }
    )
    logging.getLogger("uvicorn.access").disabled = True  # service.access has a line that says more
    logging.captureWarnings(capture=True)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `ts`, `level`, `logger`, `pid`, `msg`, the request's id, and facts.

    `ts` is UTC in ISO 8601 to the millisecond. A traceback is the text `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
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
    """A line for people: time, level, logger, message, and facts as `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows on lines of its own."""
        facts = "".join(f" {name}={_bare(value)}" for name, value in _facts(record).items())
        text = (
            f"{_utc(record.created)} {record.levelname.lower():<8} {record.name}:"
            f" {_one_line(record.getMessage())}{facts}"
        )
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What the record was given under `extra={"facts": ...}`, and the id of its request."""
    given: dict[str, Any] | None = getattr(record, "facts", None)
    if given is not None:
        return given
    notes = _request.get()
    return {"request_id": notes["request_id"]} if notes else {}


def _utc(created: float) -> str:
    seconds = int(created)
    return f"{_second(seconds)}.{int((created - seconds) * 1000):03d}Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _json(line: dict[str, Any]) -> str:
    try:
        return orjson.dumps(line, default=str).decode()
    except orjson.JSONEncodeError:  # half a surrogate pair, from a path that is no UTF-8
        return orjson.dumps({name: ascii(value) for name, value in line.items()}).decode()


def _bare(value: object) -> str:
    """A fact as text, quoted where it has anything but plain signs in it."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="}
    return text if plain and text else ascii(text)


def _one_line(text: str) -> str:
    """The text without what could pass for another line, or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
