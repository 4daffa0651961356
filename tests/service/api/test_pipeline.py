import asyncio
import threading

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.pipeline import Prepared, batch_of, counted, opened, prepare_all
from service.api.state import ServiceState
from service.core.errors import ProblemError
from service.images.decode import decode, prepare
from service.observability.metrics import Metrics


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.fixture
def state(settings) -> ServiceState:
    state = ServiceState(settings.model_copy(update={"threads": 2}))
    yield state
    state.scheduler.close()


def test_every_image_has_its_row_or_its_problem_in_its_place(state, card, png, encode, image):
    other = encode(image.rotate(90, expand=True))
    files = [("a", png), ("b", b"x"), ("c", other), ("d", png[:99])]
    first, second, third, fourth = run(lambda: prepare_all(state, card, files))
    for prepared, content in ((first, png), (third, other)):
        row, geometry = prepare(decode(content, 10**6), card)
        np.testing.assert_array_equal(prepared.row, row)
        assert prepared.geometry == geometry
        assert prepared.image is None
    assert (second.status, fourth.status) == (415, 400)
    assert second.detail.startswith("b: ")
    assert fourth.detail.startswith("d: ")


def test_batches_are_rows_in_order(state, card, png, encode, image):
    files = [("a", png), ("b", encode(image.rotate(180)))]
    prepared = run(lambda: prepare_all(state, card, files))
    batch = batch_of(prepared)
    assert (batch.shape, batch.dtype) == ((2, 3, 64, 96), np.float32)
    for row, one in zip(batch, prepared, strict=True):
        np.testing.assert_array_equal(row, one.row)
    np.testing.assert_array_equal(batch_of(prepared[1:]), batch[1:])


def test_the_image_is_counted_while_it_is_used(state, card, png):
    async def scenario():
        total = state.decoded.free
        async with opened(state, card, "a", png, keep=True) as prepared:
            assert prepared.image.size == (192, 128)
            # The image and a conversion of it, of four bytes a pixel each.
            assert total - state.decoded.free >= 192 * 128 * 8
        assert state.decoded.free == total

    run(scenario)


def test_images_wait_for_room_in_turn(settings, card, png, monkeypatch):
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

    monkeypatch.setattr("service.api.pipeline.decode", watched)
    told = {"threads": 4, "max_decoded_bytes": 3 * 2**20}  # one image needs 2.4 MB
    state = ServiceState(settings.model_copy(update=told))
    prepared = run(lambda: prepare_all(state, card, [("a", png)] * 12))
    state.scheduler.close()
    assert all(isinstance(one, Prepared) for one in prepared)
    assert most == 1
    assert state.decoded.free == state.decoded.total


def test_what_is_dropped_while_it_decodes_is_counted_until_the_end(state, card, png, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def slow(*arguments):
        began.set()
        assert go_on.wait(5)
        return decode(*arguments)

    monkeypatch.setattr("service.api.pipeline.decode", slow)

    async def scenario():
        total = state.decoded.free
        work = asyncio.ensure_future(prepare_all(state, card, [("a", png)]))
        while not began.is_set():
            await asyncio.sleep(0)
        work.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        assert state.decoded.free < total
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert state.decoded.free == total

    run(scenario)


def test_what_is_dropped_before_it_decodes_is_not_decoded(settings, card, png, monkeypatch):
    began, go_on, decoded = threading.Event(), threading.Event(), []

    def slow(content, *arguments):
        decoded.append(content)
        began.set()
        assert go_on.wait(5)
        return decode(content, *arguments)

    monkeypatch.setattr("service.api.pipeline.decode", slow)
    state = ServiceState(settings)  # one thread

    async def scenario():
        first = asyncio.ensure_future(prepare_all(state, card, [("a", png)]))
        while not began.is_set():
            await asyncio.sleep(0)
        second = asyncio.ensure_future(prepare_all(state, card, [("b", png)]))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second

    run(scenario)
    state.scheduler.close()
    assert len(decoded) == 1
    assert state.decoded.free == state.decoded.total


def rejected(metrics: Metrics) -> dict[str, float]:
    text = metrics.render()[0].decode()
    return {
        sample.labels["reason"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "ghm_rejected_requests_total"
    }


@pytest.mark.parametrize(
    ("status", "reasons"), [(413, {"too_large": 1}), (504, {"deadline": 1}), (400, {})]
)
def test_refusals_are_counted_by_reason(status, reasons):
    metrics = Metrics()
    with pytest.raises(ProblemError), counted(metrics):
        raise ProblemError(status, "no")
    assert rejected(metrics) == reasons
