import asyncio
import contextvars
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from service.observability import logs


@pytest.fixture(autouse=True)
def restored():
    """The loggers as they were: the configuration is the process's."""
    names = (None, "ghm", "uvicorn", "uvicorn.error", "uvicorn.access", "py.warnings")
    loggers = [logging.getLogger(name) for name in names]
    before = [(one.level, list(one.handlers), one.propagate, one.disabled) for one in loggers]
    yield
    logging.captureWarnings(capture=False)
    for one, (level, handlers, propagate, disabled) in zip(loggers, before, strict=True):
        one.setLevel(level)
        one.handlers[:] = handlers
        one.propagate, one.disabled = propagate, disabled


@pytest.fixture
def lines(capsys):
    """Configures, lets something happen in a context of its own, and returns the lines."""

    def log(happens, level="info", kind="json") -> list:
        logs.configure(level, kind)
        contextvars.copy_context().run(happens)
        text = capsys.readouterr().err
        return [json.loads(line) for line in text.splitlines()] if kind == "json" else text

    return log


def test_a_line_of_json(lines):
    (line,) = lines(lambda: logging.getLogger("ghm.service").warning("so %s", "it is"))
    assert list(line) == ["ts", "level", "logger", "pid", "msg"]  # and no request_id
    assert (line["level"], line["logger"], line["msg"]) == ("warning", "ghm.service", "so it is")
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line["ts"])).total_seconds()) < 60
    record = logging.makeLogRecord({"created": 1_700_000_000.25, "msg": "x"})
    assert json.loads(logs.JsonFormatter().format(record))["ts"] == "2023-11-14T22:13:20.250Z"


def test_a_line_of_text(lines):
    def happens():
        logs.begin_request("abc")
        logging.getLogger("ghm.service").info("read %d tokens", 2)

    text = lines(happens, kind="text")
    assert text.endswith("Z info     ghm.service: read 2 tokens request_id=abc\n")


def test_records_of_a_request_carry_its_id_in_tasks_and_threads_too(lines):
    logger = logging.getLogger("ghm.service")

    async def request(name):
        logs.begin_request(name)
        logger.info("begins")
        await asyncio.create_task(part(name))
        await asyncio.to_thread(logger.info, "in a thread")

    async def part(name):
        await asyncio.sleep(0)
        logger.info("in a task")

    async def both():
        await asyncio.gather(request("one"), request("other"))

    found = lines(lambda: asyncio.run(both()))
    for name in ("one", "other"):
        said = [line["msg"] for line in found if line["request_id"] == name]
        assert said == ["begins", "in a task", "in a thread"]


def test_uvicorns_loggers_and_warnings_are_formatted_too(lines):
    logging.getLogger("uvicorn").addHandler(logging.StreamHandler(sys.stderr))
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(sys.stderr))

    def happens():
        logging.getLogger("uvicorn.error").info("Started")
        logging.getLogger("uvicorn.access").info("said twice")
        logging.getLogger("somebody").info("chatter")
        logging.getLogger("somebody").warning("trouble")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old", DeprecationWarning, stacklevel=1)

    found = lines(happens)
    assert [line["logger"] for line in found] == ["uvicorn.error", "somebody", "py.warnings"]


@pytest.mark.parametrize(("level", "shown"), [("debug", 3), ("info", 2), ("error", 1)])
def test_levels(lines, level, shown):
    def happens():
        for one in (logging.DEBUG, logging.INFO, logging.ERROR):
            logging.getLogger("ghm.service").log(one, "x")

    assert len(lines(happens, level)) == shown


def test_a_traceback_stays_on_its_line(lines):
    def happens():
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("ghm.service").exception("failed")

    (line,) = lines(happens)
    assert line["msg"] == "failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: why")


def test_nothing_that_a_client_sends_makes_a_line_of_its_own(lines):
    forged = '/a\n{"level":"critical"}\x1b[2J\ud800'

    def happens():
        logging.getLogger("ghm.access").info("request", extra={"facts": {"path": forged}})
        logging.getLogger("ghm.service").info("at %s", forged)

    assert len(lines(happens)) == 2
    text = lines(happens, kind="text")
    assert text.count("\n") == 2
    assert "\x1b" not in text


def test_notes_are_summed_over_threads_and_dropped_outside_of_a_request():
    def happens():
        notes = logs.begin_request("abc")
        logs.note(model="a", images=2)
        context = contextvars.copy_context()
        note = threading.Thread(target=context.run, args=(lambda: logs.note(model="b", images=3),))
        note.start()
        note.join()
        return notes

    notes = contextvars.copy_context().run(happens)
    assert notes == {"request_id": "abc", "model": "b", "images": 5}
    contextvars.Context().run(logs.note, model="a")


FORBIDDEN = """
import os
def forbid(path, *_): raise PermissionError(13, path)
os.open = forbid
"""


@pytest.mark.parametrize(
    ("pair", "first"),
    [(os.pipe, ""), (os.pipe, FORBIDDEN), (socket.socketpair, "")],
    ids=["pipe", "pipe of another user", "socket"],
)
def test_a_log_that_nobody_reads_stops_nothing(pair, first):
    program = (
        "import logging; from service.observability import logs\n"
        f"{first}\nlogs.configure('info', 'json')\n"
        "for number in range(20_000): logging.getLogger('ghm').info('%s', 'x' * (number % 9000))"
    )
    reader, writer = (one if isinstance(one, int) else one.detach() for one in pair())
    subprocess.run([sys.executable, "-c", program], stderr=writer, check=True, timeout=60)
    os.close(writer)
    with os.fdopen(reader, "rb") as received:
        lines = received.read().splitlines()
    assert 0 < len(lines) < 20_000
    for line in lines[:-1]:  # the last one may be cut
        assert json.loads(line)["msg"].strip("x") == ""


def test_a_line_that_did_not_fit_is_completed_before_the_next():
    program = (
        "import sys; from service.observability.logs import _stderr; pipe = _stderr()\n"
        "pipe.write('x' * 200_000); print(flush=True); sys.stdin.readline(); pipe.write('y')"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.readline()
        first = os.read(process.stderr.fileno(), 200_000)
        process.stdin.write(b"\n")
        process.stdin.close()
        rest = process.stderr.read()
    assert 0 < len(first) < len(first + rest) < 200_000
    assert set(first + rest) == set(b"x")


class Reader:
    """Stands in for stderr: a pipe or a socket with a reader that can be slow."""

    def __init__(self, kind: str) -> None:
        if kind == "pipe":
            self.reading, self.writing = os.pipe()
        else:
            self.ends = socket.socketpair()
            self.reading, self.writing = (end.fileno() for end in self.ends)

    def fileno(self) -> int:
        return self.writing

    def read(self) -> bytes:
        os.set_blocking(self.reading, False)
        parts = []
        with suppress(BlockingIOError):
            while part := os.read(self.reading, 2**20):
                parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize("kind", ["pipe", "socket", "another user's pipe"])
def test_lines_are_dropped_while_nobody_reads_and_go_on_after(kind, monkeypatch):
    reader = Reader(kind.split()[-1])
    monkeypatch.setattr("sys.stderr", reader)
    if kind == "another user's pipe":

        def refuse(*arguments):
            raise PermissionError

        monkeypatch.setattr("os.open", refuse)
    stream = logs._stderr()
    monkeypatch.undo()
    line = "x" * 1000 + "\n"
    for _ in range(5000):
        stream.write(line)
        stream.flush()
    first = reader.read()
    assert 0 < len(first) < 5000 * len(line)
    stream.write("y\n")
    lines = (first + reader.read()).decode().splitlines()
    assert set(lines) == {"x" * 1000, "y"}
    assert lines[-1] == "y"


def test_a_file_is_written_to_as_it_is(tmp_path, monkeypatch):
    with (tmp_path / "log").open("w") as file:
        monkeypatch.setattr("sys.stderr", file)
        assert logs._stderr() is file
