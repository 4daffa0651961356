"""Kinds 7 and 8: signals, full and read-only disks, missing descriptors, and models that hang."""

import fcntl
import os
import resource
import signal
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

import onnx
import pytest
from PIL import Image

from tests.attack.core import PATIENCE, Service, cases, head, serving, until
from tests.attack.test_models import graph, loop_for_ever
from tests.service.conftest import encode_image

STOPPING = {name: getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")}
IGNORED = {name: getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGWINCH")}


def begun(service: Service, body: bytes):
    """A request of which the service has read the beginning; it is answered after its end."""
    connection = service.connect()
    expects = head(b"Content-Length: %d" % len(body), b"Expect: 100-continue")
    connection.sendall(expects)
    assert connection.recv(1024).startswith(b"HTTP/1.1 100")
    return connection


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("sent", cases(8, STOPPING))
def test_a_signal_that_stops_loses_no_request(detector, png, tmp_path, sent, number):
    with serving(detector, tmp_path, "--workers", number, "--drain-seconds", 1) as service:
        connection = begun(service, png)
        service.process.send_signal(sent)
        connection.sendall(png)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.close()
        service.ends()


@pytest.mark.parametrize("sent", cases(8, IGNORED))
def test_a_signal_without_a_meaning_changes_nothing(service, workers, png, sent):
    for running in (service, workers):
        for pid in running.pids():
            os.kill(pid, sent)
        running.detects(png)
        running.lives()


def busy(service: Service) -> list[int]:
    return service.pids()[1:]


def is_worker(pid: int) -> bool:
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"resource_tracker" not in command


@pytest.mark.parametrize("sent", cases(7, {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}))
def test_a_worker_that_stops_is_replaced(detector, png, tmp_path, sent):
    with serving(detector, tmp_path, "--workers", 2, GHM_HEARTBEAT_SECONDS="1") as service:
        victim = next(pid for pid in busy(service) if is_worker(pid))
        os.kill(victim, sent)
        until(lambda: not Path(f"/proc/{victim}").exists(), 30)
        until(lambda: sum(map(is_worker, busy(service))) == 2)
        service.detects(png)


def test_workers_end_with_a_supervisor_that_is_killed(detector, tmp_path):
    with serving(detector, tmp_path, "--workers", 2) as service:
        workers = busy(service)
        service.process.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 30)


@pytest.mark.parametrize("number", [1, 2])
def test_no_descriptors_are_no_end(detector, png, tmp_path, number):
    """Not even where a worker ends at that moment."""
    with serving(detector, tmp_path, "--workers", number) as service, ExitStack() as stack:
        for pid in service.pids():
            used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, 20_000))
        for pid in busy(service)[-1:]:
            os.kill(pid, signal.SIGKILL)
        for _ in range(40):
            stack.enter_context(service.connect())
        for pid in service.pids():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (20_000, 20_000))
        until(lambda: answers(service))
        service.detects(png)


def answers(service: Service) -> bool:
    with suppress(OSError):
        return service.ask("/health/ready").status == 200
    return False


FULL = {
    "full": ("size=16k", 1),
    "full, two workers": ("size=16k", 2),
    "filled later, two workers": ("size=16m", 2),
    "read-only": ("ro,size=1m", 1),
    "read-only, two workers": ("ro,size=1m", 2),
}


@pytest.mark.parametrize(("options", "number"), cases(8, FULL))
def test_a_temporary_folder_that_takes_no_files_is_no_end(detector, png, tmp_path, options, number):
    folder = Path(tempfile.mkdtemp())
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here: needs root")
    try:
        arguments = ("--workers", number, "--rate-limit", 1000)
        with serving(detector, tmp_path, *arguments, TMPDIR=str(folder)) as service:
            if not service.port:  # what workers share does not fit: one sentence says so
                assert service.process.wait(PATIENCE) == 2
                assert "No space left on device" in service.log().splitlines()[-1]
                assert "Traceback" not in service.log()
                return
            with suppress(OSError), (folder / "filler").open("wb") as filler:
                for _ in range(17):
                    filler.write(bytes(2**20))
            service.detects(png)
            assert service.ask("/metrics").status == 200
            service.lives()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_log_that_nobody_reads_stops_no_answer(detector, png, tmp_path):
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        with serving(detector, tmp_path, stderr=writer) as service:
            for _ in range(40):  # lines of 300 bytes
                assert service.ask("/v1/detect", png, seconds=20).status == 200
    finally:
        os.close(reader)
        os.close(writer)


def test_a_log_whose_reader_is_gone_stops_no_answer(detector, png, tmp_path):
    reader, writer = os.pipe()
    with serving(detector, tmp_path, stderr=writer) as service:
        os.close(reader)
        for _ in range(20):
            service.detects(png)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(PATIENCE) == 0
    os.close(writer)


def hanging() -> bytes:
    """A detector that answers black, and hangs on white: its loop counts to a pixel * 2^60."""
    content = onnx.load_model_from_string(graph(loop_for_ever))
    loop = next(node for node in content.graph.node if node.op_type == "Loop")
    far = onnx.helper.make_tensor("far", onnx.TensorProto.FLOAT, [], [2.0**60])
    content.graph.initializer.append(far)
    scaled = onnx.helper.make_node("Mul", ["light", "far"], ["light_far"])
    top = onnx.helper.make_node("Clip", ["start", "zero"], ["light"])
    cast = onnx.helper.make_node("Cast", ["light_far"], ["rounds"], to=onnx.TensorProto.INT64)
    for place, node in enumerate((top, scaled, cast)):
        content.graph.node.insert(1 + place, node)
    loop.input[0] = "rounds"
    return content.SerializeToString()


@pytest.mark.parametrize("number", [1, 2])
def test_a_hung_inference_ends_at_its_deadline(png, tmp_path, number):
    path = tmp_path / "hanging.onnx"
    path.write_bytes(hanging())
    black, white = (picture(value) for value in (0, 255))
    arguments = ("--workers", number, "--deadline-ms", 1000)
    with serving(path, tmp_path / "log", *arguments) as service:
        assert service.ask("/v1/detect", black).status == 200
        for _ in range(4):
            assert service.ask("/v1/detect", white).status in (503, 504)
        until(lambda: service.ask("/v1/detect", black).status == 200, 30)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 0


def picture(value: int) -> bytes:
    return encode_image(Image.new("RGB", (96, 64), (value,) * 3))
