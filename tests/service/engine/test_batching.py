import asyncio
import threading

import numpy as np
import pytest

from export.file import read_detector
from service.core.detections import DetectOptions, resolve
from service.core.errors import ProblemError
from service.engine.batching import Scheduler
from service.engine.session import ModelError, ServedModel

pytestmark = pytest.mark.anyio

HOUR = 3_600_000  # milliseconds; a test that waited for it would time out


class GatedModel(ServedModel):
    """A real model that waits for its gate, remembers its batches, and refuses black images."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.batches: list[int] = []

    def run(self, batch, *thresholds, options=None):
        self.gate.wait(30)
        self.batches.append(len(batch))
        if (batch.reshape(len(batch), -1) == -1).all(axis=1).any():
            raise ModelError("black")
        return super().run(batch, *thresholds, options=options)


class Watcher:
    """Stands in for Metrics."""

    def __init__(self):
        self.refused, self.sizes, self.queues = [], [], []
        self.rejected, self.batch = self.refused.append, self.sizes.append

    def stage(self, stage, seconds):
        assert seconds >= 0

    def queue(self, waiting, running):
        self.queues.append((waiting, running))


@pytest.fixture
def gated(detector):
    return GatedModel(read_detector(detector), provider="cpu")


@pytest.fixture
def make(settings):
    """A scheduler with some settings changed, and what observes it."""

    def scheduler(**changes):
        watcher = Watcher()
        return Scheduler(settings.model_copy(update=changes), watcher), watcher

    return scheduler


def images(number: int, value: float = 0.0) -> np.ndarray:
    return np.full((number, 3, 64, 96), value, np.float32)


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(number, 3, 64, 96)).astype(np.float32)


def params(model, **options):
    return resolve(DetectOptions(**options), model.card)


async def several(scheduler, model, jobs, cancelled=()):
    """Start jobs in order, the first of which runs; cancel some, and let the others go."""

    async def one(batch, wanted):
        with scheduler.admit(len(batch)):
            return await scheduler.run(model, batch, wanted)

    tasks = []
    for batch, wanted in jobs:
        tasks.append(asyncio.create_task(one(batch, wanted)))
        await asyncio.sleep(0)  # only lets it start: the order is that of the jobs
    for index in cancelled:
        tasks[index].cancel()
    await asyncio.sleep(0)
    model.gate.set()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_the_outputs_are_those_of_the_model(make, model):
    scheduler, watcher = make()
    wanted = params(model, threshold=0.01)
    outputs = asyncio.run(scheduler.run(model, noise(3), wanted))
    direct = model.run(noise(3), wanted.class_thresholds, wanted.iou_threshold)
    assert np.array_equal(outputs.scores, direct.scores)
    assert len(outputs.image(2).boxes) > 0
    assert watcher.sizes == [3]
    assert watcher.queues == [(0, 3), (0, 0)]
    assert 0 < scheduler._image_seconds < 30


def test_each_request_has_its_own_thresholds(make, model, gated):
    scheduler, _ = make(batch_size=8)
    all_params = [None, params(model, threshold=0.01)] * 2
    jobs = [(noise(1), wanted) for wanted in all_params]
    numbers = [int(one.num_detections[0]) for one in asyncio.run(several(scheduler, gated, jobs))]
    assert numbers[0] == numbers[2] < numbers[1] == numbers[3]
    assert gated.batches in ([1, 1, 2], [1, 2, 1])


@pytest.mark.parametrize(
    ("changes", "sizes", "cancelled", "batches"),
    [
        ({}, [1, 1, 1, 1], [], [1, 1, 1, 1]),  # batching is off on a CPU
        ({"batch_size": 4}, [1, 2, 1, 2, 1], [], [1, 4, 2]),  # 1 runs; 2 + 1 + 1 share; 2 is left
        ({"batch_size": 8}, [1, 1, 1, 1], [2], [1, 2]),  # cancelled images take no place
        ({}, [1, 2, 3], [1], [1, 3]),
        ({}, [1, 2], [0], [1, 2]),  # one that runs already runs to its end
    ],
)
def test_images_that_wait_share_inferences(make, gated, changes, sizes, cancelled, batches):
    scheduler, watcher = make(**changes)
    jobs = [(images(size, size / 10), None) for size in sizes]
    answers = asyncio.run(several(scheduler, gated, jobs, cancelled))
    assert gated.batches == watcher.sizes == batches
    assert watcher.queues[-1] == (0, 0)
    assert scheduler.in_flight == 0
    for index, (size, answer) in enumerate(zip(sizes, answers, strict=True)):
        if index in cancelled:
            assert isinstance(answer, asyncio.CancelledError)
        else:
            assert len(answer) == size


def test_a_share_of_a_batch_equals_the_image_alone(make, model, gated):
    rows, wanted = noise(6)[:, None], params(model, threshold=0.02)
    scheduler, _ = make(batch_size=8)
    answers = asyncio.run(several(scheduler, gated, [(row, wanted) for row in rows]))
    assert gated.batches == [1, 5]
    for row, answer in zip(rows, answers, strict=True):
        alone = model.run(row, wanted.class_thresholds, wanted.iou_threshold)
        assert np.array_equal(answer.labels, alone.labels)
        # A batch may be summed in another order: float32's own rounding, 2**-24, a few times.
        np.testing.assert_allclose(answer.scores, alone.scores, rtol=1e-6)


@pytest.mark.parametrize(
    ("wait", "admitted", "runs", "batches"),
    [
        (HOUR, 1, 1, [1]),  # a lone request does not wait
        (HOUR, 2, 2, [2]),  # one waits for another that is still being decoded
        (1, 2, 1, [1]),  # and no longer than it may
    ],
)
async def test_waiting_for_other_images(make, gated, wait, admitted, runs, batches):
    scheduler, _ = make(batch_size=2, batch_wait_ms=wait)
    gated.gate.set()
    with scheduler.admit(admitted):
        tasks = [asyncio.create_task(scheduler.run(gated, images(1))) for _ in range(runs)]
        await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert gated.batches == batches


async def test_another_model_or_overlap_is_another_inference(make, gated, detector):
    other = GatedModel(read_detector(detector), provider="cpu")
    scheduler, _ = make(batch_size=8)
    runs = [scheduler.run(model, images(1), params(model)) for model in (gated, gated, other)]
    runs += [scheduler.run(gated, images(1), params(gated, iou=0.9))]
    tasks = [asyncio.create_task(run) for run in runs]
    await asyncio.sleep(0)
    gated.gate.set()
    other.gate.set()
    await asyncio.gather(*tasks)
    assert (gated.batches, other.batches) == ([1, 1, 1], [1])


def test_only_the_cause_of_a_failed_batch_fails(make, gated):
    scheduler, _ = make(batch_size=8)
    jobs = [(images(1, value), None) for value in (0, 0, -1, 0)]
    answers = asyncio.run(several(scheduler, gated, jobs))
    assert gated.batches == [1, 3, 1, 1, 1]
    assert [isinstance(answer, ModelError) for answer in answers] == [False, False, True, False]


async def test_any_error_of_a_model_reaches_its_request_only(make, model, monkeypatch):
    scheduler, _ = make()

    def fail(*inputs, **options):
        raise RuntimeError("surprise")

    with monkeypatch.context() as patch:
        patch.setattr(model, "run", fail)
        with pytest.raises(RuntimeError, match="surprise"):
            await scheduler.run(model, images(1))
    assert len(await scheduler.run(model, images(1))) == 1


def test_a_full_queue_refuses_and_estimates_when_to_retry(make):
    scheduler, watcher = make(queue_size=3, inferences=2)
    scheduler._image_seconds = 4.0
    with scheduler.admit(2), scheduler.admit(3):
        with pytest.raises(ProblemError, match="5 images are waiting") as refused:
            scheduler.admit(1).__enter__()
        assert refused.value.status == 429
        assert refused.value.headers["Retry-After"] == "10"  # 5 images, 4 s each, 2 at a time
        assert scheduler.in_flight == 5
    assert scheduler.in_flight == 0
    assert watcher.refused == ["queue_full"]


def test_an_idle_service_takes_a_request_of_any_size(make):
    scheduler, _ = make(queue_size=0)
    with scheduler.admit(16), pytest.raises(ProblemError):
        scheduler.admit(1).__enter__()


def test_images_that_would_wait_beyond_the_deadline_are_refused_at_once(make):
    scheduler, _ = make(queue_size=1000, deadline_ms=2000)
    scheduler._image_seconds = 1.0
    with scheduler.admit(2):
        scheduler.check_room()
    with scheduler.admit(3), pytest.raises(ProblemError, match="busy"):
        scheduler.check_room()


def test_decoding_runs_in_threads_and_raises_what_it_raises(make):
    scheduler, _ = make()

    def fail(value):
        raise ValueError(f"{value} in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="7 in decode"):
        asyncio.run(scheduler.decode(fail, 7))


def test_a_closed_scheduler_can_start_again(make, model):
    scheduler, _ = make()
    scheduler.close()
    assert len(asyncio.run(scheduler.run(model, images(1)))) == 1
    assert asyncio.run(scheduler.decode(int, "7")) == 7


async def test_an_endless_inference_is_ended_at_the_deadline(make, endless_detector, model):
    endless = ServedModel(read_detector(endless_detector), provider="cpu")
    scheduler, _ = make(deadline_ms=50, inferences=1)
    with pytest.raises(ModelError, match="terminate"):
        await scheduler.run(endless, images(1))
    assert not scheduler.stuck
    assert len(await scheduler.run(model, images(1))) == 1


async def test_a_closed_scheduler_ends_its_inferences(make, endless_detector):
    endless = ServedModel(read_detector(endless_detector), provider="cpu")
    scheduler, _ = make(deadline_ms=HOUR)
    running = asyncio.ensure_future(scheduler.run(endless, images(1)))
    await asyncio.sleep(0)  # the inference is started
    scheduler.close()
    with pytest.raises(ModelError, match="terminate"):
        await running


async def test_an_inference_that_cannot_be_ended_frees_its_slot(make, gated, model, monkeypatch):
    monkeypatch.setattr("service.engine.batching._GRACE_SECONDS", 0.01)
    scheduler, _ = make(deadline_ms=10, inferences=1, batch_size=1)
    results = await asyncio.gather(
        scheduler.run(gated, images(1)), scheduler.run(gated, images(1)), return_exceptions=True
    )
    assert [str(result) for result in results] == ["an inference of 'colours' does not end"] * 2
    assert scheduler.stuck == {gated}
    with pytest.raises(ProblemError, match="does not end"):
        await scheduler.run(gated, images(1))
    scheduler._settings = scheduler._settings.model_copy(update={"deadline_ms": HOUR})
    others = scheduler.run(model, images(1))
    assert len(await asyncio.wait_for(others, 30)) == 1
    gated.gate.set()
    while scheduler.stuck:
        await asyncio.sleep(0)
    assert len(await scheduler.run(gated, images(1))) == 1
