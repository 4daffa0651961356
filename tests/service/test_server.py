"""A process that stops in good order. Its signals are in test_workers.py, with real ones."""

import asyncio
import signal

import pytest

from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.server import DrainingServer, banner, prepare
from service.workers import Supervisor


@pytest.fixture
def server(settings, model):
    def make(**changes) -> DrainingServer:
        told = settings.model_copy(update=changes)
        return DrainingServer(create_app(told, model), told)

    return make


def draining(server) -> bool:
    return server.config.app.state.service.draining


def test_sigterm_drains_first(server):
    one = server(drain_seconds=5)
    one.handle_exit(signal.SIGTERM, None)
    assert draining(one)
    assert not one.should_exit
    assert one._captured_signals == []  # or uvicorn would end the process by it


def test_while_it_drains_connections_are_closed_after_each_answer(server):
    one, close = server(drain_seconds=5), (b"connection", b"close")
    one.config.load()
    asyncio.run(one.on_tick(0))
    assert close not in one.server_state.default_headers
    one.handle_exit(signal.SIGTERM, None)
    for tick in (1, 2, 10):  # every tenth makes the headers anew
        assert not asyncio.run(one.on_tick(tick))
        assert one.server_state.default_headers.count(close) == 1


def test_a_second_signal_ends_the_drain(server):
    one = server(drain_seconds=5)
    one.handle_exit(signal.SIGTERM, None)
    one.handle_exit(signal.SIGTERM, None)
    assert one.should_exit
    assert not one.force_exit


def test_ctrl_c_does_not_drain_and_a_second_one_drops_what_is_in_work(server):
    one = server(drain_seconds=5)
    one.handle_exit(signal.SIGINT, None)
    assert draining(one)
    assert one.should_exit
    assert not one.force_exit
    one.handle_exit(signal.SIGINT, None)
    assert one.force_exit


def test_seconds_to_end_are_never_cut(server):
    assert server(shutdown_seconds=0.2).config.timeout_graceful_shutdown == 1
    assert server(shutdown_seconds=7).config.timeout_graceful_shutdown == 7


def test_uvloop_is_used_where_it_is_installed(server):
    pytest.importorskip("uvloop")
    config = server().config
    config.load()
    assert config.get_loop_factory().__module__.startswith("uvloop")


def test_prepared_is_ready(settings):
    app = prepare(settings)
    assert app.state.service.registry.get().warm
    assert "thresholds by policy 'f1'" in banner(app)
    assert "colours runs on CPUExecutionProvider, threads: 1" in banner(app)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere/x.onnx"}, "^/nowhere/x.onnx: No such file or directory$"),
        ({"tokens": "a b"}, "GHM_TOKENS: token 1"),
        ({"cors_origins": "x"}, "cors_origins: 'x'"),
    ],
)
def test_what_cannot_start_says_why(settings, changes, message):
    told = Settings(**{**settings.model_dump(exclude_none=True), **changes})
    with pytest.raises(SettingsError, match=message):
        prepare(told)


def test_a_worker_that_cannot_be_started_ends_no_other(monkeypatch, caplog):
    def fail(self):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("uvicorn.supervisors.multiprocess.Multiprocess.keep_subprocess_alive", fail)
    Supervisor.keep_subprocess_alive(object.__new__(Supervisor))
    assert "a worker cannot be started: [Errno 24] Too many open files" in caplog.text
