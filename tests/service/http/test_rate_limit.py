import asyncio
import os
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.core.worker_files import VARIABLE
from service.http.limiter import SETS, WAYS, Limiter, client_network
from service.http.rate_limit import RateLimitMiddleware
from service.observability.metrics import Metrics


def test_a_burst_and_then_the_rate(clock):
    limiter = Limiter(rate=2, burst=3, name="x", clock=clock)
    assert [limiter.wait("a") for _ in range(3)] == [0, 0, 0]
    assert limiter.wait("a") == 0.5
    clock.now += 0.25
    assert limiter.wait("a") == 0.25  # asking too early costs nothing
    clock.now += 0.25
    assert limiter.wait("a") == 0
    assert limiter.wait("a") == 0.5


def test_waiting_as_long_as_it_says_is_enough(clock):
    limiter = Limiter(rate=8, burst=1, name="x", clock=clock)  # eighths are exact in binary
    for _ in range(50):
        assert limiter.wait("a") == 0
        clock.now += limiter.wait("a")


def test_a_bucket_holds_no_more_than_its_burst(clock):
    limiter = Limiter(rate=1, burst=2, name="x", clock=clock)
    clock.now += 1000
    assert [limiter.wait("a") > 0 for _ in range(3)] == [False, False, True]
    clock.now += 1000
    assert [limiter.wait("a") > 0 for _ in range(3)] == [False, False, True]


def test_clients_do_not_share(clock):
    limiter = Limiter(rate=1, burst=1, name="x", clock=clock)
    assert limiter.wait("a") == limiter.wait("b") == 0
    assert limiter.wait("a") == limiter.wait("b") == 1


def test_as_many_clients_as_may_be_the_longest_unseen_forgotten(clock):
    limiter = Limiter(rate=1e-6, burst=1, sets=1, name="x", clock=clock)
    for client in [*range(WAYS), 0, "one more"]:
        clock.now += 1
        limiter.wait(str(client))
    remembered = [0, *range(2, WAYS), "one more"]
    assert all(limiter.wait(str(client)) > 0 for client in remembered)
    assert limiter.wait("1") == 0


def test_many_clients_find_room(clock):
    limiter = Limiter(rate=1e-6, burst=1, name="x", clock=clock)
    for _ in range(2):
        clock.now += 1
        again = [limiter.wait(f"10.0.{i // 256}.{i % 256}") for i in range(SETS)]
    # A set that more than its WAYS fall in forgets some: with one a set on average, once in 10^6.
    assert sum(wait > 0 for wait in again) >= SETS - 2


TAKER = """
import sys
from service.http.limiter import Limiter
limiter = Limiter(rate=1e-6, burst=9_600, name="rates")
print("ready", flush=True)
sys.stdin.read()
print(sum(limiter.wait("a") == 0 for _ in range(8_000)))
"""


def test_workers_take_from_the_same_buckets(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {VARIABLE: str(tmp_path)}
    command = [sys.executable, "-c", TAKER]
    running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    assert [one.stdout.readline() for one in running] == ["ready\n"] * 2
    for one in running:
        one.stdin.close()
    taken = [int(one.stdout.read()) for one in running]
    assert [one.wait(60) for one in running] == [0, 0]
    assert sum(taken) == 9_600  # not one more, though both take at once


@pytest.fixture
def limited(serve_with):
    return lambda **changes: serve_with(rate_limit=1e-3, rate_burst=2, **changes)


def test_too_often_is_a_429_with_a_time_to_wait(limited, png, problem):
    with limited() as client:
        assert [client.post("/v1/detect", content=png).status_code for _ in range(2)] == [200, 200]
        refused = client.post("/v1/detect", content=png)
        assert problem(refused, 429).startswith("more than 0.001 requests a second; ask again in")
        assert 990 <= int(refused.headers["retry-after"]) <= 1000
        assert [client.get("/health/live").status_code for _ in range(5)] == [200] * 5
        assert client.get("/v1/models").status_code == 429


def test_retry_after_is_whole_seconds_and_never_too_few(told, clock):
    sent = []

    async def send(message):
        sent.append(message)

    middleware = RateLimitMiddleware(None, told(rate_limit=0.8, rate_burst=1), Metrics())
    middleware.limiter = Limiter(0.8, 1, name="x", clock=clock)
    middleware.limiter.wait("unknown")
    clock.now += 0.25
    scope = {"type": "http", "path": "/v1/models", "state": {}}
    asyncio.run(middleware(scope, None, send))
    assert dict(sent[0]["headers"])[b"retry-after"] == b"1"  # 1 / 0.8 - 0.25 is 1 exactly
    clock.now -= 0.125
    asyncio.run(middleware(scope, None, send))
    assert dict(sent[2]["headers"])[b"retry-after"] == b"2"


def test_each_token_has_its_own_bucket_and_wrong_ones_take_from_none(limited):
    with limited(tokens="a:first,b:second", public_metrics=True) as client:

        def ask(token):
            headers = {"Authorization": f"Bearer {token}"}
            return client.get("/v1/models", headers=headers).status_code

        assert [ask("wrong") for _ in range(3)] == [401] * 3
        assert [ask("first") for _ in range(3)] == [200, 200, 429]
        assert ask("second") == 200
        counted = client.get("/metrics").text
    assert 'ghm_rejected_requests_total{reason="rate_limit"} 1.0' in counted


def test_openapi_has_the_429_where_there_is_a_limit(limited, client):
    paths, unlimited = (one.get("/openapi.json").json()["paths"] for one in (limited(), client))
    assert "429" in paths["/v1/models"]["get"]["responses"]
    assert "429" not in paths["/health/live"]["get"]["responses"]
    assert "429" not in unlimited["/v1/models"]["get"]["responses"]


@pytest.mark.parametrize(
    ("trusted", "host", "statuses"),
    [
        ("", "127.0.0.1", [200, 429]),
        ("127.0.0.1", "127.0.0.1", [200, 200]),
        ("10.0.0.0/8, 127.0.0.1", "10.1.2.3", [200, 200]),
        ("10.0.0.1", "127.0.0.1", [200, 429]),
        ("unix", None, [200, 200]),
        ("10.0.0.1", None, [200, 429]),
    ],
)
def test_a_trusted_proxy_names_the_client(told, model, trusted, host, statuses):
    app = create_app(told(rate_limit=1e-3, rate_burst=1, trusted_proxies=trusted), model)

    async def connected(scope, receive, send):
        await app({**scope, "client": (host, 1) if host else None}, receive, send)

    client = TestClient(connected)
    for number, status in enumerate(statuses):
        headers = {"X-Forwarded-For": f"198.51.100.7, 203.0.113.{number}"}
        assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("testclient", "testclient"),
    ],
)
def test_an_ipv6_network_is_one_client(address, client):
    assert client_network({"client": (address, 1)}) == client
