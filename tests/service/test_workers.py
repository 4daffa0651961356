"""Several real processes at one address: killed, replaced, drained. Every wait has a deadline."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from service.workers import _stop_with_parent

ROOT = Path(__file__).parents[2]
RUN = "import sys; from ghm_triton.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GHM_")}
ENVIRONMENT["HOME"] = "/proc/nowhere"  # as in containers without a home that can be written to
PATIENCE = 60  # seconds that a loaded machine may take for anything; only failures wait so long


class Service:
    """A running `ghm serve`: its address, and its log as it grows."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[dict] = []
        self._arriving: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        printed = iter(process.stdout)
        self.url = next((line.split()[-1] for line in printed if line.startswith("serving")), "")
        assert self.url, self.rest()
        self.port = int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        for line in self.process.stderr:
            self._arriving.put(json.loads(line) if line.startswith("{") else {"msg": line})
        self._arriving.put(None)  # every process that could write has ended

    def wait(self, wanted: Callable[[dict], bool], count: int = 1) -> list[dict]:
        """Reads the log until so many of its lines are wanted; returns them."""
        found = [line for line in self.lines if wanted(line)]
        while len(found) < count:
            line = self._arriving.get(timeout=PATIENCE)
            assert line is not None, self.lines[-5:]
            self.lines.append(line)
            found += [line] if wanted(line) else []
        return found

    def rest(self) -> list[dict]:
        """The whole log, once all processes have ended."""
        while (line := self._arriving.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
        return self.lines

    def ends(self) -> None:
        """Ends as it should: with status 0, no process left, no traceback, and only JSON lines."""
        assert self.process.wait(PATIENCE) == 0, self.rest()
        assert [line for line in self.rest() if "ts" not in line or "Traceback" in str(line)] == []

    def ready(self) -> int:
        return httpx.get(f"{self.url}/health/ready").status_code

    def connects(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE).close()
        except ConnectionError:
            return False
        return True


@contextmanager
def service(*arguments: object, **variables: str):
    command = [sys.executable, "-c", RUN, *map(str, arguments), "--port", "0", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # In a session of its own, so that whatever a failure leaves running is ended with it.
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | variables, start_new_session=True, **pipes
    ) as process:
        try:
            yield Service(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def says(text: str) -> Callable[[dict], bool]:
    return lambda line: line["msg"].startswith(text)


def answered(line: dict) -> bool:
    return line.get("path") == "/v1/detect"


def counted(url: str) -> int:
    """Detections of all workers, as Prometheus sees them."""
    text = httpx.get(f"{url}/metrics").text
    wanted = 'ghm_request_duration_seconds_count{method="POST",route="/v1/detect",status="200"}'
    return sum(int(float(one.split()[-1])) for one in text.splitlines() if one.startswith(wanted))


class HalfSent:
    """A request that a worker has begun to read, and whose end is still to come."""

    def __init__(self, running: Service, body: bytes) -> None:
        self.connection = socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE)
        self.half = len(body) // 2
        self.body = body
        head = f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        self.connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert self.connection.recv(1024).startswith(b"HTTP/1.1 100")  # so somebody reads it
        self.connection.sendall(body[: self.half])

    def finish(self) -> bytes:
        """Sends the rest; returns the answer."""
        with self.connection:
            self.connection.sendall(self.body[self.half :])
            return b"".join(iter(lambda: self.connection.recv(65536), b""))


def test_a_killed_worker_is_replaced_the_others_go_on_and_counters_never_fall(
    detector, png, tmp_path
):
    with service(detector, "--workers", 2, TMPDIR=str(tmp_path)) as running:

        def detect(times: int) -> None:
            for _ in range(times):
                assert httpx.post(f"{running.url}/v1/detect", content=png).status_code == 200

        detect(10)
        pids = Counter(line["pid"] for line in running.wait(answered, count=10))
        victim = pids.most_common(1)[0][0]  # who has counted, so that it could be lost
        assert counted(running.url) == 10
        os.kill(victim, signal.SIGKILL)
        running.wait(says(f"worker {victim} ended with status -9"))
        detect(5)  # before another has had the time to start
        running.wait(answered, count=15)
        assert counted(running.url) == 15
        (folder,) = tmp_path.glob("ghm-*")
        names = {path.name for path in folder.iterdir()}
        assert "counter_retired.db" in names
        assert not [name for name in names if str(victim) in name]
        newest = running.wait(says("Application startup complete."), count=3)[-1]["pid"]
        assert newest not in (victim, *pids)
        detect(5)
        running.wait(answered, count=20)
        assert counted(running.url) == 20
        running.process.send_signal(signal.SIGTERM)
        running.ends()
        assert not folder.exists()


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_under_load_loses_no_request(detector, png, number):
    """Ready falls first; a load balancer sees it and sends no more; what was sent is answered."""
    with service(detector, "--workers", number, "--drain-seconds", 1) as running:
        unready = threading.Event()

        def send() -> Counter:
            statuses: Counter = Counter()
            with httpx.Client(base_url=running.url, timeout=PATIENCE) as client:
                while not unready.is_set():
                    statuses[client.post("/v1/detect", content=png).status_code] += 1
            return statuses

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(send) for _ in range(4)]
            running.wait(answered, count=20)
            slow = HalfSent(running, png)
            running.process.send_signal(signal.SIGTERM)
            while running.ready() == 200:
                pass
            unready.set()
            for client in clients:
                statuses = client.result(PATIENCE)
                assert set(statuses) == {200}
        while running.connects():  # the drain goes on until nobody is let in
            pass
        answer = slow.finish()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b'"class"') == 3
        running.ends()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("stop", [signal.SIGHUP, signal.SIGQUIT])
def test_further_signals_lose_no_request(detector, png, number, stop):
    with service(detector, "--workers", number) as running:
        slow = HalfSent(running, png)
        for ignored in (signal.SIGUSR1, signal.SIGUSR2):
            os.killpg(running.process.pid, ignored)
        assert running.ready() == 200
        os.killpg(running.process.pid, stop)
        while running.connects():
            pass
        assert slow.finish().startswith(b"HTTP/1.1 200")
        running.ends()


@pytest.mark.slow
def test_a_client_that_never_ends_does_not_hold_the_stop(detector, png):
    with service(detector, "--workers", 2, "--shutdown-seconds", 1) as running:
        slow = HalfSent(running, png)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE) == 0
        slow.connection.close()


@pytest.mark.slow
def test_ctrl_c_reaches_everybody_at_once_and_stops_them_in_good_order(detector):
    with service(detector, "--workers", 2) as running:
        os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
        running.ends()


@pytest.mark.slow
def test_ctrl_c_while_workers_start_is_no_traceback(detector):
    command = [sys.executable, "-c", RUN, str(detector), "--port", "0", "--workers", "2"]
    with subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.PIPE
    ) as process:
        log = b""
        while b"the model runs on" not in log:  # a worker's word; it does not answer yet
            line = process.stderr.readline()
            assert line, log
            log += line
        os.killpg(process.pid, signal.SIGINT)
        log += process.stderr.read()
    assert process.returncode == 0, log
    assert b"Traceback" not in log


@pytest.mark.slow
def test_a_worker_that_does_not_run_is_replaced(detector, png):
    with service(detector, "--workers", 2, GHM_HEARTBEAT_SECONDS="3") as running:
        victim = running.wait(says("Application startup complete."), count=2)[0]["pid"]
        os.kill(victim, signal.SIGSTOP)
        running.wait(says(f"worker {victim} gives no sign of life"))
        running.wait(says("Application startup complete."), count=3)
        assert running.ready() == 200
        running.process.send_signal(signal.SIGTERM)
        running.ends()


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_sigterm_ends_an_endless_inference(endless_detector, detector, png, tmp_path, number):
    (tmp_path / "endless.onnx").write_bytes(endless_detector.read_bytes())
    (tmp_path / "good.onnx").write_bytes(detector.read_bytes())
    options = {"GHM_LOAD_SECONDS": "2", "GHM_SHUTDOWN_SECONDS": "1"}
    with service(tmp_path, "--workers", number, **options) as running:
        assert running.ready() == 200
        running.process.send_signal(signal.SIGTERM)
        running.ends()


@pytest.mark.slow
def test_workers_do_not_outlive_their_parent(detector):
    with service(detector, "--workers", 2) as running:
        running.process.kill()
        running.rest()  # returns once nobody holds the log any more
        assert not running.connects()


def hang_as_a_worker() -> None:
    threading.Thread(target=_stop_with_parent, args=(0.1,), daemon=True).start()
    threading.Event().wait()


def test_a_worker_that_hangs_ends_after_its_parent():
    program = (
        "import os, signal; from multiprocessing import get_context\n"
        "from tests.service.test_workers import hang_as_a_worker\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "get_context('spawn').Process(target=hang_as_a_worker).start()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        process.communicate(timeout=PATIENCE)  # returns once the worker has ended as well


@pytest.mark.slow
def test_a_worker_that_cannot_start_again_is_tried_again_and_the_others_go_on(detector, tmp_path):
    path = tmp_path / "colours.onnx"
    path.write_bytes(detector.read_bytes())
    with service(path, "--workers", 2) as running:
        path.write_bytes(b"damaged")
        victim = running.wait(says("Application startup complete."), count=2)[0]["pid"]
        os.kill(victim, signal.SIGKILL)
        running.wait(says("a worker cannot start: "))
        assert running.ready() == 200  # of the other, with the model that it has
        whole = tmp_path / "whole"
        whole.write_bytes(detector.read_bytes())
        whole.replace(path)
        running.wait(says("Application startup complete."), count=3)
        running.process.send_signal(signal.SIGTERM)
        running.ends()


def test_workers_that_cannot_start_say_why(tmp_path):
    path = tmp_path / "none.onnx"
    command = [sys.executable, "-c", RUN, str(path), "--port", "0", "--workers", "2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 2
    last = done.stderr.decode().splitlines()[-1]
    assert last == f"ghm serve: {path}: No such file or directory"
