"""Many clients at once, over real connections."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import pytest

from service.app import create_app

pytestmark = pytest.mark.slow


def crowd(url: str, clients: int, requests: int, ask) -> list[httpx.Response]:
    """The answers of several clients, each asking one thing after another."""

    def one(_: int) -> list[httpx.Response]:
        with httpx.Client(base_url=url, timeout=60) as client:
            return [ask(client) for _ in range(requests)]

    with ThreadPoolExecutor(clients) as pool:
        return [answer for answers in pool.map(one, range(clients)) for answer in answers]


def test_beyond_capacity_some_are_refused_and_the_others_served_in_time(
    settings, model, serve, png
):
    told = settings.model_copy(update={"queue_size": 3, "deadline_ms": 20_000})
    app = create_app(told, model)
    scheduler, most = app.state.service.scheduler, 0
    admitted = scheduler.admit

    def watched(images):
        nonlocal most
        most = max(most, scheduler.in_flight + images)
        return admitted(images)

    scheduler.admit = watched

    def ask(client: httpx.Client) -> httpx.Response:
        assert client.get("/health/live").status_code == 200
        return client.post("/v1/detect", content=png)

    with serve(app) as url:
        answers = crowd(url, 16, 12, ask)
        statuses = {answer.status_code for answer in answers}
        assert statuses == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.headers["content-type"] == "application/problem+json"
            else:
                assert len(answer.json()["detections"]) == 3
                assert answer.json()["timings"]["total_ms"] <= told.deadline_ms
        assert most <= 3 + 1 + 1  # the queue, the one that runs, and the one that is refused
        metrics = httpx.get(f"{url}/metrics").text
    refused = sum(answer.status_code == 429 for answer in answers)
    assert f'ghm_rejected_requests_total{{reason="queue_full"}} {float(refused)}' in metrics
    assert scheduler.in_flight == 0


@pytest.mark.slow
def test_models_are_replaced_under_load_without_an_error_or_a_mixture(
    settings, serve, write_detector, png, tmp_path
):
    path = tmp_path / "served.onnx"
    raised = {"red": 0.55, "green": 0.65, "blue": 0.75}
    variants = [write_detector(), write_detector(**thresholds_of(raised))]
    shutil.copy(variants[0], path)
    told = settings.model_copy(update={"model": path, "reload_seconds": 0, "queue_size": 1000})
    done = Event()

    def replace_again_and_again(url: str) -> int:
        rounds = 0
        while not done.is_set() or rounds < 4:
            fresh = tmp_path / "fresh.onnx"
            shutil.copy(variants[(rounds + 1) % 2], fresh)
            fresh.replace(path)
            assert httpx.post(f"{url}/v1/models/colours/reload").status_code == 200
            rounds += 1
        return rounds

    with serve(create_app(told)) as url, ThreadPoolExecutor(1) as operator:
        wait_until_ready(url)
        replaced = operator.submit(replace_again_and_again, url)
        try:
            ask = lambda client: client.post("/v1/detect", content=png)  # noqa: E731
            answers = crowd(url, 8, 40, ask)
        finally:
            done.set()
        assert replaced.result() >= 4
    seen = set()
    for answer in answers:
        assert answer.status_code == 200, answer.text
        found = {d["class"]: round(d["threshold"], 4) for d in answer.json()["detections"]}
        assert found in (raised, {"red": 0.5, "green": 0.6, "blue": 0.7})
        seen.add(found["red"])
    assert seen == {0.5, 0.55}  # both have served


def thresholds_of(values: dict[str, float]) -> dict[str, list[dict]]:
    evidence = {"source": "policy", "support": 100, "ground_truths": 50}
    from ghm_triton.evidence import as_float32

    return {
        "thresholds": [
            {"name": name, "threshold": as_float32(value), "precision": 0.9, "recall": 0.8}
            | evidence
            for name, value in values.items()
        ]
    }


def wait_until_ready(url: str) -> None:
    for _ in range(10_000):
        if httpx.get(f"{url}/health/ready").status_code == 200:
            return
    pytest.fail("never ready")
