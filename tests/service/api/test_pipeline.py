import asyncio
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ghm_triton.images.decode import decode
from service.api import pipeline
from service.api.pipeline import Job, Prepared
from service.api.state import ServiceState
from service.core.detections import DetectOptions, resolve
from service.core.errors import ProblemError
from service.http.bodies import Upload
from service.images import prepare
from service.observability.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def make_job(settings, model):
    """Makes jobs of one service; `changes` are of its settings."""
    states = []

    def make(images, state=None, **changes) -> Job:
        if state is None:
            state = ServiceState(settings.model_copy(update=changes))
            states.append(state)
        upload = Upload(images, [], many=True)
        return Job(state, model, upload, DetectOptions(), "", started=0.0)

    yield make
    for state in states:
        state.scheduler.close()


@pytest.fixture
def slow_decoding(monkeypatch):
    """Decoding that waits: whether it began, what lets it go on, and what was decoded."""
    began, go_on, decoded = threading.Event(), threading.Event(), []

    def slow(content, *arguments):
        decoded.append(content)
        began.set()
        assert go_on.wait(5)
        return decode(content, *arguments)

    monkeypatch.setattr(pipeline, "decode_file", slow)
    return began, go_on, decoded


async def until(event: threading.Event) -> None:
    while not event.is_set():
        await asyncio.sleep(0)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_every_image_has_its_row_or_its_problem_in_its_place(
    make_job, card, png, encode, image
):
    other = encode(image.rotate(90, expand=True))
    job = make_job([("a", png), ("b", b"x"), ("c", other), ("d", png[:99])], threads=2)
    first, second, third, fourth = await pipeline.decode(job)
    for prepared, content in ((first, png), (third, other)):
        row, geometry = prepare(decode(content, 10**6), card)
        np.testing.assert_array_equal(prepared.row, row)
        assert prepared.geometry == geometry
        assert prepared.image is None
    assert [(one.status, one.detail[:3]) for one in (second, fourth)] == [
        (415, "b: "),
        (400, "d: "),
    ]


async def test_predictions_are_in_the_order_of_the_images(make_job, model, png, encode, image):
    job = make_job([("a", png), ("b", encode(image.rotate(180))), ("c", png)], threads=2)
    prepared = await pipeline.decode(job)
    detections = await pipeline.predict(job, prepared, resolve(job.options, model.card))
    for one, found in zip(prepared, detections, strict=True):
        alone = model.detect(one.row[None])[0]
        np.testing.assert_array_equal(found.boxes, alone.boxes)
        np.testing.assert_array_equal(found.scores, alone.scores)
    assert {"decode_ms", "inference_ms", "total_ms"} == set(job.done())


async def test_a_kept_image_is_counted_while_it_is_used(make_job, png):
    job = make_job([])
    budget = job.service.decoded

    async with pipeline.opened(job, "a", png, keep=True) as prepared:
        assert prepared.image.size == (192, 128)
        # The image and a conversion of it, of four bytes a pixel each.
        assert budget.total - budget.free >= 192 * 128 * 8
    assert budget.free == budget.total


async def test_images_wait_for_room_in_turn(make_job, png, monkeypatch):
    at_once, most, lock = 0, 0, threading.Lock()

    def watched(*arguments):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        try:
            return decode(*arguments)
        finally:
            with lock:
                at_once -= 1

    monkeypatch.setattr(pipeline, "decode_file", watched)
    job = make_job([("a", png)] * 12, threads=4, max_decoded_bytes=3 * 2**20)  # each needs 2.4 MB
    prepared = await pipeline.decode(job)
    assert all(isinstance(one, Prepared) for one in prepared)
    assert most == 1
    assert job.service.decoded.free == job.service.decoded.total


async def test_an_image_cancelled_while_it_decodes_is_counted_until_the_end(
    make_job, png, slow_decoding
):
    began, go_on, _ = slow_decoding
    job = make_job([("a", png)])
    budget = job.service.decoded

    work = asyncio.ensure_future(pipeline.decode(job))
    await until(began)
    work.cancel()
    await settle()
    assert budget.free < budget.total
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await work
    await settle()
    assert budget.free == budget.total


async def test_an_image_cancelled_before_it_decodes_is_not_decoded(make_job, png, slow_decoding):
    began, go_on, decoded = slow_decoding
    first_job = make_job([("a", png)], threads=1)
    second_job = make_job([("b", png)], first_job.service)

    first = asyncio.ensure_future(pipeline.decode(first_job))
    await until(began)
    second = asyncio.ensure_future(pipeline.decode(second_job))
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    await settle()
    budget = first_job.service.decoded
    assert (len(decoded), budget.free) == (1, budget.total)


@pytest.mark.parametrize(
    ("status", "reasons"), [(413, {"too_large": 1}), (504, {"deadline": 1}), (400, {})]
)
def test_refusals_are_counted_by_reason(status, reasons):
    metrics = Metrics()
    with pytest.raises(ProblemError), pipeline.counted(metrics):
        raise ProblemError(status, "no")
    families = text_string_to_metric_families(metrics.render()[0].decode())
    samples = [sample for family in families for sample in family.samples]
    name = "ghm_rejected_requests_total"
    assert {one.labels["reason"]: one.value for one in samples if one.name == name} == reasons
