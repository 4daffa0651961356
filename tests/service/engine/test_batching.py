import asyncio
import threading

import numpy as np
import pytest

from export.file import read_detector
from service.core.errors import ProblemError
from service.core.params import DetectOptions, resolve
from service.engine.batching import Scheduler
from service.engine.session import ModelError, ServedModel


class GatedModel(ServedModel):
    """A real model that waits to be let go, remembers its batches, and refuses black images."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.batches: list[int] = []

    def run(self, batch, *thresholds):
        self.gate.wait(30)
        self.batches.append(len(batch))
        if (batch.reshape(len(batch), -1) == -1).all(axis=1).any():
            raise ModelError("black")
        return super().run(batch, *thresholds)


class Watcher:
    def __init__(self):
        self.refused, self.sizes, self.queues = [], [], []

    def stage(self, stage, seconds):
        assert seconds >= 0

    def rejected(self, reason):
        self.refused.append(reason)

    def batch(self, size):
        self.sizes.append(size)

    def queue(self, waiting, running):
        self.queues.append((waiting, running))


@pytest.fixture
def gated(detector):
    return GatedModel(read_detector(detector), provider="cpu")


@pytest.fixture
def make(settings):
    """A scheduler with some settings changed, and its observer."""

    def scheduler(**changes):
        watcher = Watcher()
        return Scheduler(settings.model_copy(update=changes), watcher), watcher

    return scheduler


def images(number: int, value: float = 0.0) -> np.ndarray:
    return np.full((number, 3, 64, 96), value, np.float32)


def wanted(model, **options):
    return resolve(DetectOptions(**options), model.card)


async def several(scheduler, model, jobs):
    """Start jobs in order, with the first already running; let them all go."""

    async def one(batch, want):
        with scheduler.admit(len(batch)):
            return await scheduler.run(model, batch, want)

    tasks = []
    for batch, want in jobs:
        tasks.append(asyncio.create_task(one(batch, want)))
        await asyncio.sleep(0)  # only lets it start: the order is that of the jobs
    model.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_an_answer_is_that_of_the_model(make, model):
    scheduler, watcher = make()
    batch = np.random.default_rng(0).normal(size=(3, 3, 64, 96)).astype(np.float32)
    want = wanted(model, threshold=0.01)
    outputs = asyncio.run(scheduler.run(model, batch, want))
    direct = model.run(batch, want.class_thresholds, want.iou_threshold)
    assert np.array_equal(outputs.scores, direct.scores)
    assert len(outputs.image(2).boxes) > 0
    assert watcher.sizes == [3]
    assert watcher.queues == [(0, 3), (0, 0)]


def test_the_thresholds_of_each_request_are_its_own(make, model, gated):
    scheduler, _ = make(batch_size=8)
    batch = np.random.default_rng(0).normal(size=(1, 3, 64, 96)).astype(np.float32)
    wants = [None, wanted(model, threshold=0.01), None, wanted(model, threshold=0.01)]
    answers = asyncio.run(several(scheduler, gated, [(batch, want) for want in wants]))
    numbers = [int(answer.num_detections[0]) for answer in answers]
    assert numbers[0] == numbers[2] < numbers[1] == numbers[3]
    assert gated.batches == [1, 1, 2] or gated.batches == [1, 2, 1]


def test_batching_is_off_on_a_cpu_unless_asked_for(make, gated):
    scheduler, _ = make()
    asyncio.run(several(scheduler, gated, [(images(1), None)] * 4))
    assert gated.batches == [1, 1, 1, 1]


def test_what_waits_shares_an_inference_up_to_the_batch_size(make, gated):
    scheduler, watcher = make(batch_size=4)
    jobs = [(images(n, n / 10), None) for n in (1, 2, 1, 2, 1)]
    answers = asyncio.run(several(scheduler, gated, jobs))
    assert gated.batches == [1, 4, 2]  # 1 runs; then 2 + 1 + 1 fill one, and 2 is left
    assert watcher.sizes == gated.batches
    assert [len(answer) for answer in answers] == [1, 2, 1, 2, 1]


def test_a_share_of_a_batch_is_the_answer_of_the_image_alone(make, model, gated):
    rows = np.random.default_rng(1).normal(size=(6, 1, 3, 64, 96)).astype(np.float32)
    want = wanted(model, threshold=0.02)
    scheduler, _ = make(batch_size=8)
    answers = asyncio.run(several(scheduler, gated, [(row, want) for row in rows]))
    assert gated.batches == [1, 5]
    for row, answer in zip(rows, answers, strict=True):
        alone = model.run(row, want.class_thresholds, want.iou_threshold)
        assert np.array_equal(answer.labels, alone.labels)
        # A batch may be summed in another order: float32's own rounding, 2**-24, a few times.
        np.testing.assert_allclose(answer.scores, alone.scores, rtol=1e-6)


def test_a_lone_request_does_not_wait_for_company(make, model):
    # An hour's wait would time the test out.
    scheduler, _ = make(batch_size=8, batch_wait_ms=3_600_000)

    async def alone():
        with scheduler.admit(1):
            return await scheduler.run(model, images(1))

    assert len(asyncio.run(alone())) == 1


def test_a_request_waits_for_one_that_is_on_its_way(make, gated):
    scheduler, _ = make(batch_size=2, batch_wait_ms=3_600_000)
    gated.gate.set()

    async def two():
        with scheduler.admit(2):  # the second is being decoded
            first = asyncio.create_task(scheduler.run(gated, images(1)))
            await asyncio.sleep(0)
            assert gated.batches == []
            await scheduler.run(gated, images(1))
            await first

    asyncio.run(two())
    assert gated.batches == [2]


def test_the_wait_for_company_ends(make, gated):
    scheduler, _ = make(batch_size=2, batch_wait_ms=1)
    gated.gate.set()

    async def one_of_two():
        with scheduler.admit(2):
            return await asyncio.wait_for(scheduler.run(gated, images(1)), 30)

    assert len(asyncio.run(one_of_two())) == 1


def test_another_model_or_overlap_is_another_inference(make, gated, detector):
    other = GatedModel(read_detector(detector), provider="cpu")
    scheduler, _ = make(batch_size=8)

    async def check():
        both = [gated, gated, other]
        runs = [scheduler.run(model, images(1), wanted(model)) for model in both]
        runs += [scheduler.run(gated, images(1), wanted(gated, iou=0.9))]
        tasks = [asyncio.create_task(run) for run in runs]
        await asyncio.sleep(0)
        gated.gate.set()
        other.gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(check())
    assert (gated.batches, other.batches) == ([1, 1, 1], [1])


def test_what_was_cancelled_takes_no_place_in_a_batch(make, gated):
    scheduler, _ = make(batch_size=8)

    async def check():
        tasks = [asyncio.create_task(scheduler.run(gated, images(1))) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(check())
    assert gated.batches == [1, 2]


def test_only_the_culprit_of_a_batch_fails(make, gated):
    scheduler, _ = make(batch_size=8)
    jobs = [(images(1, value), None) for value in (0, 0, -1, 0)]
    answers = asyncio.run(several(scheduler, gated, jobs))
    assert gated.batches == [1, 3, 1, 1, 1]
    assert [type(answer).__name__ for answer in answers] == [
        "Outputs",
        "Outputs",
        "ModelError",
        "Outputs",
    ]


def test_any_error_of_a_model_reaches_its_request_and_nobody_else(make, model, monkeypatch):
    scheduler, _ = make()

    def fail(*inputs):
        raise RuntimeError("surprise")

    async def check():
        with monkeypatch.context() as patch:
            patch.setattr(model, "run", fail)
            with pytest.raises(RuntimeError, match="surprise"):
                await scheduler.run(model, images(1))
        assert len(await scheduler.run(model, images(1))) == 1

    asyncio.run(check())


def test_cancelled_work_is_dropped_from_the_queue(make, gated):
    scheduler, _ = make()

    async def check():
        running = asyncio.create_task(scheduler.run(gated, images(1)))
        gone = asyncio.create_task(scheduler.run(gated, images(2)))
        last = asyncio.create_task(scheduler.run(gated, images(3)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        gated.gate.set()
        await asyncio.gather(running, last)

    asyncio.run(check())
    assert gated.batches == [1, 3]


def test_work_cancelled_while_it_runs_frees_its_place(make, gated):
    scheduler, watcher = make()

    async def check():
        running = asyncio.create_task(scheduler.run(gated, images(1)))
        await asyncio.sleep(0)
        running.cancel()
        gated.gate.set()
        assert len(await scheduler.run(gated, images(2))) == 2

    asyncio.run(check())
    assert watcher.queues[-1] == (0, 0)


def test_a_full_queue_refuses_and_says_when_to_return(make):
    scheduler, watcher = make(queue_size=3, inferences=2)
    scheduler._image_seconds = 4.0
    with scheduler.admit(2), scheduler.admit(3):
        assert scheduler.in_flight == 5
        with (
            pytest.raises(ProblemError, match="5 images are waiting") as refused,
            scheduler.admit(1),
        ):
            pytest.fail("admitted")
        assert refused.value.status == 429
        assert refused.value.headers["Retry-After"] == "10"  # 5 images, 4 s each, 2 at a time
        assert scheduler.in_flight == 5
    assert scheduler.in_flight == 0
    assert watcher.refused == ["queue_full"]


def test_an_idle_service_takes_a_request_of_any_size(make):
    scheduler, _ = make(queue_size=0)
    with scheduler.admit(16), pytest.raises(ProblemError), scheduler.admit(1):
        pytest.fail("admitted")


def test_what_would_wait_beyond_the_deadline_is_refused_at_once(make):
    scheduler, _ = make(queue_size=1000, deadline_ms=2000)
    scheduler._image_seconds = 1.0
    with scheduler.admit(2):
        scheduler.check_room()
    with scheduler.admit(3), pytest.raises(ProblemError) as refused:
        scheduler.check_room()
    assert refused.value.status == 429


def test_the_cost_of_an_image_is_learnt(make, model):
    scheduler, _ = make()
    asyncio.run(scheduler.run(model, images(4)))
    assert 0 < scheduler._image_seconds < 30


def test_decoding_runs_in_threads_and_raises_what_it_raises(make):
    scheduler, _ = make()

    def fail(value):
        raise ValueError(f"{value} in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="7 in decode"):
        asyncio.run(scheduler.decode(fail, 7))


def test_a_closed_scheduler_can_begin_again(make, model):
    scheduler, _ = make()
    scheduler.close()
    assert len(asyncio.run(scheduler.run(model, images(1)))) == 1
    assert asyncio.run(scheduler.decode(int, "7")) == 7
