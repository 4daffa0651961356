"""A process that stops in good order. Its signals are in test_workers.py, with real ones."""

import asyncio
import signal
import threading

import pytest
import trustme

from service.app import create_app
from service.core.settings import Settings, SettingsError
from service.server import (
    DrainingServer,
    _check_certificate,
    _end_process_in,
    banner,
    prepare,
)
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


def test_the_process_ends_though_work_does_not(monkeypatch, caplog):
    ended = threading.Event()
    statuses = []
    monkeypatch.setattr("os._exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr("logging.shutdown", lambda: None)
    _end_process_in(0.01)
    assert ended.wait(30)
    assert statuses == [1]
    assert "work does not end" in caplog.text


@pytest.mark.parametrize("name", ["chain", "nothing"])
def test_a_certificate_is_checked_before_the_start(told, tmp_path, name):
    chain, key = tmp_path / "chain", tmp_path / "key"
    certificate = trustme.CA().issue_cert("127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    _check_certificate(told(ssl_certfile=chain, ssl_keyfile=key))
    with pytest.raises(SettingsError, match=f"ssl_certfile .*{name}: "):
        _check_certificate(told(ssl_certfile=tmp_path / name))
    with pytest.raises(SettingsError, match="ssl_certfile is not"):
        _check_certificate(told(ssl_keyfile=key))
