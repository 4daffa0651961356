"""The command as a user runs it: a process, a printed address, real requests."""

import argparse
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
import trustme
from onnx import numpy_helper

from export.file import read_detector
from service.cli import COMMANDS, _announce, _listen
from service.engine.session import ServedModel

ROOT = Path(__file__).parents[2]
RUN = (
    "import argparse, sys\n"
    "from service.cli import COMMANDS\n"
    "parser = argparse.ArgumentParser(prog='ghm serve')\n"
    "COMMANDS[0].configure(parser)\n"
    "sys.exit(COMMANDS[0].run(parser.parse_args()))\n"
)


# A developer's own settings must not leak into the tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("GHM_")}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, arguments)]


def refused(*arguments: object) -> str:
    """What a start that must fail says, beside its log."""
    done = subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return "".join(
        line for line in done.stderr.splitlines(keepends=True) if not line.startswith("{")
    )


@contextmanager
def running(
    *arguments: object, stop: int = signal.SIGTERM, log: list[str] | None = None, **variables: str
) -> Iterator[tuple[str, list[str]]]:
    """Run the command until a signal; yields the address that it prints, and all lines so far."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = ENVIRONMENT | variables
    with subprocess.Popen(command(*arguments), cwd=ROOT, env=environment, **pipes) as process:
        printed = []
        try:
            while not (printed and printed[-1].startswith("serving at ")):
                line = process.stdout.readline()
                assert line, process.stderr.read()  # it ended before it served
                printed.append(line.rstrip("\n"))
            yield printed[-1].split()[-1], printed
        finally:
            process.send_signal(stop)
            _, written = process.communicate(timeout=60)
    assert process.returncode == 0, written
    assert "Traceback" not in written
    if log is not None:
        log.append(written)


def test_a_unix_socket_is_taken_over_from_a_service_that_has_ended(detector, tmp_path):
    path = tmp_path / "ghm.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with running(detector, "--uds", path, GHM_PORT="tcp://10.0.0.7:8000") as (address, _):
        assert address == f"unix:{path}"
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.get("http://ghm/health/ready").status_code == 200
        assert "Address already in use" in refused(detector, "--uds", path)
    assert not path.exists()


def test_https_under_a_prefix(detector, tmp_path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    files = ("--ssl-certfile", chain, "--ssl-keyfile", key)
    options = ("--port", 0, *files, "--root-path", "/ghm")
    with running(detector, *options, GHM_TOKENS="a") as (address, _):
        assert address.startswith("https://")
        with httpx.Client(base_url=address, verify=context) as client:
            for prefix in ("", "/ghm"):  # of a proxy that takes it away, and of one that does not
                assert client.get(f"{prefix}/health/ready").status_code == 200
                assert client.get(f"{prefix}/v1/models").status_code == 401
            assert client.get("/openapi.json").json()["servers"] == [{"url": "/ghm"}]
    assert f"ssl_certfile {key} with {chain}: " in refused(
        detector, "--ssl-certfile", key, "--ssl-keyfile", chain
    )
    assert "ssl_certfile is not" in refused(detector, "--ssl-keyfile", key)


def test_the_wildcard_of_ipv6_is_that_of_ipv4_too(detector):
    with running(detector, "--port", 0, "--host", "::") as (address, _):
        port = address.rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/health/live").status_code == 200


@pytest.fixture(scope="module")
def served(detector):
    arguments = (detector, "--port", 0, "--threads", 1, "--max-upload-mb", 0.5)
    with running(*arguments, stop=signal.SIGINT) as service:
        yield service


def test_prints_thresholds_and_an_address(served):
    url, lines = served
    assert lines[0] == "thresholds by policy 'f1'"
    assert lines[1].split()[:5] == ["class", "threshold", "from", "positives", "held-out"]
    assert lines[3].split() == ["red", "0.5000", "policy", "100", "50", "90.0", "%", "80.0", "%"]
    assert [line.split()[0] for line in lines[3:6]] == ["red", "green", "blue"]
    assert lines[6] == "colours runs on CPUExecutionProvider, threads: 1"
    assert url.startswith("http://127.0.0.1:")
    assert not url.endswith(":0")


def test_detects_over_a_real_connection(served, png, client):
    url, _ = served
    answer = httpx.post(f"{url}/v1/detect", files={"file": ("a.png", png)}).json()
    expected = client.post("/v1/detect", content=png).json()
    assert answer["detections"] == expected["detections"] != []


def test_is_ready_as_soon_as_the_address_is_printed(served):
    assert httpx.get(f"{served[0]}/health/ready").json()["status"] == "ready"


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_a_body_gets_its_413_over_a_real_connection(served, chunked):
    def chunks():
        for _ in range(64):
            yield b"x" * 2**16

    content = chunks() if chunked else b"x" * 2**22
    response = httpx.post(f"{served[0]}/v1/detect", content=content)
    assert response.status_code == 413
    assert str(2**19) in response.json()["error"]


def test_a_client_that_goes_away_does_no_harm(served, png):
    url, _ = served
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        connection.sendall(head.encode() + png[:100])
    assert httpx.post(f"{url}/v1/detect", content=png).status_code == 200


def test_no_model():
    assert "neither GHM_MODEL nor GHM_MODELS is set" in refused()


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "none.onnx"
    assert refused(path) == f"ghm serve: {path}: No such file or directory\n"


@pytest.mark.slow
def test_a_file_that_is_no_detector(tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_text("hello")
    assert refused(path) == f"ghm serve: {path}: not an ONNX file, or cut short\n"


@pytest.mark.slow
def test_a_graph_that_loads_but_does_not_run(detector, tmp_path):
    model = onnx.load(detector)
    for tensor in model.graph.initializer:
        if tensor.name == "flat":  # a shape that the scores do not have
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, 50]), "flat"))
    path = tmp_path / "broken.onnx"
    onnx.save(model, path)
    said = refused(path)
    assert f"{path}: the model failed its warm-up: inference failed" in said
    assert "ghm serve: " in said  # onnxruntime has its own say before


@pytest.mark.slow
def test_a_folder_of_models_and_what_runs_each(detector, tmp_path):
    for place in ("red.onnx", "blue/2.onnx"):
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(detector.read_bytes())
    log = []
    arguments = (tmp_path, "--port", 0, "--threads", 1, "--log-format", "text")
    with running(*arguments, log=log) as (url, printed):
        names = {one["name"] for one in httpx.get(f"{url}/v1/models").json()["models"]}
    assert "blue 2 runs on CPUExecutionProvider, threads: 1" in printed
    assert "red 1 runs on CPUExecutionProvider, threads: 1" in printed
    assert names == {"red", "blue"}
    assert " info     ghm.service: stopping" in log[0]


@pytest.mark.slow
def test_an_empty_folder(tmp_path):
    assert refused(tmp_path) == f"ghm serve: {tmp_path}: no .onnx file in this folder\n"


@pytest.mark.slow
def test_a_provider_that_does_not_work_here_whatever_its_variable_is_called(detector, monkeypatch):
    if ServedModel(read_detector(detector)).providers[0] != "CPUExecutionProvider":
        pytest.skip("CUDA works here")
    monkeypatch.setitem(ENVIRONMENT, "GHM_PROVIDERS", "cuda")
    assert "provider cuda does not work here" in refused(detector)


@pytest.mark.slow
def test_a_port_that_is_taken(detector):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(detector, "--port", port)
    assert said == f"ghm serve: cannot listen at 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port is 70000"),
        (["--threads", "0"], "threads is 0"),
        (["--provider", "tpu"], "invalid choice: 'tpu'"),
        (["--max-upload-mb", "nan"], "must be a positive number, got nan"),
        (["--max-megapixels", "1000"], "max_pixels is 1000000000"),
    ],
)
def test_an_option_that_cannot_be(detector, arguments, message):
    assert message in refused(detector, *arguments)


def test_the_command_is_found_by_its_fields():
    serve, _ = COMMANDS
    assert (serve.name, serve.extra) == ("serve", "serve")
    parser = argparse.ArgumentParser()
    serve.configure(parser)
    text = parser.format_help()
    assert "ghm serve detector.onnx" in text
    assert "curl -F file=@photo.jpg" in text
    assert serve.help


@pytest.mark.parametrize(
    ("changes", "address"),
    [
        ({"host": "0.0.0.0"}, r"http://127\.0\.0\.1:\d+"),  # noqa: S104
        ({"host": "::"}, r"http://\[::1\]:\d+"),
        ({"host": "127.0.0.1", "ssl_certfile": Path("chain")}, r"https://127\.0\.0\.1:\d+"),
        ({"uds": True}, r"unix:.*ghm\.sock"),
    ],
)
def test_the_address_that_is_printed_can_be_opened(told, tmp_path, capsys, changes, address):
    path = tmp_path / "ghm.sock"
    settings = told(**{"port": 0} | changes | ({"uds": path} if "uds" in changes else {}))
    with _listen(settings) as listener:
        _announce("thresholds", listener, settings)
        with socket.socket(listener.family) as client:
            client.connect(listener.getsockname())
        if settings.uds:
            with pytest.raises(OSError, match=r"cannot listen at .*: Address already in use"):
                _listen(settings).__enter__()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "thresholds"
    assert re.fullmatch(f"serving at {address}", last)
    assert not path.exists()
