"""Kind 9: addresses that are claimed, odd headers, names and logs."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from onnx import ModelProto, TensorProto, helper

from tests.attack.core import END, Service, cases, head, parse_answers, run, serving
from tests.attack.test_models import field, graph, needs, written
from tests.attack.test_signals_and_disks import picture

TOKEN = "a" * 32
BURST = 3


def from_address(service: Service, source: str, path: str, **headers: str) -> int:
    """The status of a GET from another address of loopback."""
    connection = HTTPConnection("127.0.0.1", service.port, 60, source_address=(source, 0))
    connection.request("GET", path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def breaks(model: ModelProto) -> None:
    """Fails on pictures that are not black."""
    make = helper.make_node
    needs(
        model,
        make("ReduceMax", ["images"], ["most"], keepdims=0),
        make("Clip", ["most", "zero"], ["light"]),
        make("Cast", ["light"], ["place"], to=TensorProto.INT64),
        make("Gather", ["zero_row", "place"], ["found_there"]),
        make("Cast", ["found_there"], ["end"], to=TensorProto.FLOAT),
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[Service]:
    """With tokens and CORS, and a model that fails on pictures that are not black."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "breaks.onnx").write_bytes(graph(breaks))
    variables = {"GHM_TOKENS": TOKEN, "GHM_CORS_ORIGINS": "https://a.example"}
    with serving(folder / "breaks.onnx", folder, **variables) as running:
        yield running


@pytest.fixture(scope="module")
def limited(detector, tmp_path_factory) -> Iterator[Service]:
    """With a rate limit, and a proxy that is trusted at 127.0.0.9."""
    variables = {"GHM_RATE_BURST": str(BURST), "GHM_TRUSTED_PROXIES": "127.0.0.9"}
    folder = tmp_path_factory.mktemp("limited")
    with serving(detector, folder, "--rate-limit", 0.001, **variables) as running:
        yield running


CLAIMS = ["X_Forwarded_For", "Forwarded", "X_Real_IP", "True_Client_IP", "CF_Connecting_IP", "Via"]


@pytest.mark.parametrize("header", cases(9, {name: name for name in CLAIMS}))
def test_an_address_that_a_client_claims_is_not_believed(limited, header):
    source = f"127.0.1.{CLAIMS.index(header) + 1}"
    claimed = [f"203.0.113.{number}" for number in range(10)]
    text = "for={}" if header == "Forwarded" else "{}"
    statuses = [
        from_address(limited, source, "/v1/models", **{header: text.format(one)}) for one in claimed
    ]
    assert statuses == [200] * BURST + [429] * (10 - BURST)


FORWARDED = {
    "addresses of an IPv6 network": (lambda n: f"2001:db8:1:1::{n}", BURST),
    "ports of an address": (lambda n: f"198.51.100.1:{n + 1}", BURST),
    "claim in front of the proxy's word": (lambda n: f"203.0.113.{n}, 198.51.100.2", BURST),
    "other clients": (lambda n: f"198.51.100.{n + 10}", 10),
}


@pytest.mark.parametrize(("claim", "passed"), cases(9, FORWARDED))
def test_a_trusted_proxy_names_the_client(limited, claim, passed):
    statuses = [
        from_address(limited, "127.0.0.9", "/v1/models", X_Forwarded_For=claim(number))
        for number in range(10)
    ]
    assert statuses.count(200) == passed


def test_guesses_of_a_token_are_slowed(guarded):
    guesses = [
        from_address(guarded, "127.0.2.1", "/v1/models", Authorization=f"Bearer guess{number}")
        for number in range(150)
    ]
    assert set(guesses) == {401, 429}
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert from_address(guarded, "127.0.2.2", "/v1/models", **right) == 200


def test_a_failure_can_be_read_by_pages_of_other_origins(guarded):
    asked = {"Origin": "https://a.example", "Authorization": f"Bearer {TOKEN}"}
    for value, status in ((0, 200), (255, 500)):
        answer = guarded.ask("/v1/detect", picture(value), Content_Type="image/png", **asked)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == "https://a.example"


HEADS = ["/health/live", "/health/ready", "/v1/models", "/metrics", "/v2/health/ready", "/docs"]


@pytest.mark.parametrize("path", cases(9, {path: path for path in HEADS}))
def test_head_is_get_without_a_body(service, path):
    answer = service.ask(path, method="HEAD")
    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("page", cases(9, {path: path for path in ("/", "/docs", "/redoc")}))
def test_pages_load_nothing_from_elsewhere(service, page):
    answer = service.ask(page)
    if answer.status == 200:
        assert "default-src" in answer.headers["content-security-policy"]
        assert b"//cdn" not in answer.body
        assert b'src="http' not in answer.body
    else:
        assert answer.status == 404


WEIGHTS = ["gzip;q=0", "gzip;q=0.000", "*;q=0", "identity", "gzip;q=0, deflate", "x-gzipped"]


@pytest.mark.parametrize("accepted", cases(9, {text: text for text in WEIGHTS}))
def test_gzip_that_is_refused_is_not_sent(service, accepted):
    answer = service.ask("/", Accept_Encoding=accepted)
    assert answer.headers.get("content-encoding") is None
    assert b"<html" in answer.body


PATHS = ["/v1/detect/", "//v1/detect", "/v1//detect", "/v1/detect/.", "/V1/detect", "/v1/models/"]


@pytest.mark.parametrize("path", cases(9, {path: path for path in PATHS}))
def test_nobody_is_sent_to_a_host_that_a_request_names(service, png, path):
    line = f"POST {path} HTTP/1.1".encode()
    length = b"Content-Length: %d" % len(png)
    answers = service.exchange(head(length, first=line, host=b"evil.example") + png + END)
    assert "location" not in answers[0].headers
    assert answers[0].status in (404, 405)


def test_a_client_that_ends_its_side_is_answered(service, png):
    request = head(b"Content-Length: %d" % len(png)) + png
    [answer] = parse_answers(service.send(request, half_close=True))
    assert answer.status == 200


def test_what_is_no_request_is_logged_and_counted(service):
    service.send(b"nonsense\r\n\r\n")
    line = next(line for line in service.log().splitlines()[::-1] if "refused with" in line)
    assert "127.0.0.1" in line
    assert b'reason="malformed"' in service.ask("/metrics").body


def test_paths_and_methods_that_nobody_knows_are_no_labels(service):
    before = len(service.ask("/metrics").body)
    for number in range(100):
        service.ask(f"/nothing/{number}", method=f"M{number}")
    assert len(service.ask("/metrics").body) < before + 4000


@pytest.mark.parametrize("path", ["/v1/models/colours/reload", "/v2/repository/models/x/load"])
def test_nobody_reloads_a_model_without_a_token(service, path):
    assert service.ask(path, b"").status in (403, 404)


def test_every_line_of_the_log_is_json(service, workers):
    for running in (service, workers):
        for line in running.log().splitlines():
            assert isinstance(json.loads(line), dict)


def test_every_address_means_version_4_too(detector, tmp_path):
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    with serving(detector, tmp_path, "--host", "::") as service:
        service.lives()  # asked at 127.0.0.1


NAMES = ["a\nb", "a\x1b[2J\x1b]0;b\x07", "a b/c?d#e%f", "\u202ea", '"}{', "a" * 900, "ä 💥"]


@pytest.mark.parametrize("name", cases(9, {ascii(name)[:30]: name for name in NAMES}))
def test_a_class_of_an_odd_name_breaks_nothing(tmp_path, png, name):
    def change(card):
        field("class_names", 0, value=name)(card)
        return field("thresholds", 0, "name", value=name)(card)

    path = tmp_path / "odd.onnx"
    path.write_bytes(written(change))
    shown = run("inspect", path)
    assert not set(shown.stdout + shown.stderr) & set("\x1b\x07\u202e")
    assert "Traceback" not in shown.stderr
    with serving(path, tmp_path) as service:
        if service.port:  # else it is refused, as `ghm inspect` says
            service.detects(png)
            for route in ("/v2/models/colours", "/v2/models/colours/config", "/metrics"):
                assert service.ask(route).status < 500
            assert service.ask("/v1/detect?format=image", png).status == 200
        else:
            assert shown.returncode != 0
