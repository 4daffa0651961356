"""Kind 3: crowds that retry at once, leave, or ask for much, beside an honest client."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.attack.core import MIB, Canary, Service, cases, head, serving

CROWD, TRIES = 24, 12
SLOWER = 5000  # times: the crowd takes the same processors, and the same interpreter as the canary


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def small(request, detector, tmp_path_factory) -> Iterator[Service]:
    """A service whose queue is short."""
    folder = tmp_path_factory.mktemp("small")
    arguments = ("--queue-size", 2, "--workers", request.param)
    with serving(detector, folder, *arguments) as running:
        yield running


def post(body: bytes, *lines: bytes, path: bytes = b"/v1/detect") -> bytes:
    return head(*lines, b"Content-Length: %d" % len(body), first=b"POST " + path + b" HTTP/1.1")


def once(service: Service, body: bytes) -> None:
    answer = service.send(post(body, b"Connection: close") + body)
    assert answer[9:12] in (b"200", b"429", b"503"), answer[:200]


def many(service: Service, body: bytes) -> None:
    service.send(*[post(body) + body] * 5, post(body, b"Connection: close") + body)


def leaves(service: Service, body: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(post(body) + body)


def leaves_early(service: Service, body: bytes) -> None:
    with service.connect() as connection:
        connection.sendall(post(body) + body[: len(body) // 2])


def connects(service: Service, body: bytes) -> None:
    service.connect().close()


def draws(service: Service, body: bytes) -> None:
    path = b"/v1/detect?format=image"
    service.send(post(body, b"Connection: close", path=path) + body)


def batches(service: Service, body: bytes) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n%s\r\n' % body
    form = part * 16 + b"--b--\r\n"
    kind = b"Content-Type: multipart/form-data; boundary=b"
    service.send(post(form, kind, b"Connection: close") + form)


def fails_at_once(service: Service, body: bytes) -> None:
    service.send(post(b"x", b"Connection: close") + b"x")


STORMS: dict[str, Callable[[Service, bytes], None]] = {
    "retries": once,
    "pipelined retries": many,
    "clients that leave": leaves,
    "clients that leave early": leaves_early,
    "connections alone": connects,
    "drawn pictures": draws,
    "batches": batches,
    "bodies that are refused": fails_at_once,
}


@pytest.mark.parametrize("storm", cases(3, STORMS))
def test_an_honest_client_is_served_in_a_storm(small, png, storm):
    before = small.descriptors()
    with small.grows_at_most(128 * MIB), Canary(small, SLOWER), ThreadPoolExecutor(CROWD) as pool:
        crowd = [pool.submit(storm, small, png) for _ in range(CROWD * TRIES)]
        served = 0
        while served < 5:  # as a client that respects 429
            answer = small.ask("/v1/detect", png, Content_Type="image/png")
            assert answer.status in (200, 429, 503), answer
            if answer.status != 200:
                assert int(answer.headers["retry-after"]) >= 1
            served += answer.status == 200
        for one in crowd:
            one.result()
    small.detects(png)
    small.lives()
    assert small.descriptors() <= before + 16
