"""Queueing and batching: inference and decoding off the event loop.

Images wait in one bounded queue, first come, first served. A few threads run inferences; with
batching, images of several requests that use the same thresholds share one. A request that would
wait longer than it may is refused at once, with the time after which to retry.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from service.core.detections import DetectionParams, Outputs
from service.core.errors import ProblemError
from service.core.settings import Settings
from service.engine.session import CUDA, ModelError, ServedModel
from service.observability.metrics import Metrics

T = TypeVar("T")

# On an accelerator, a batch costs little more than one image.
_BATCH_ON_CUDA = 8

# Weight of the latest measurement in the estimated time per image.
_SMOOTHING = 0.1


@dataclass(eq=False)
class _Job:
    """Images of one request, waiting for their inference."""

    model: ServedModel
    batch: npt.NDArray[Any]
    params: DetectionParams | None
    answer: asyncio.Future[Outputs]
    since: float = field(default_factory=perf_counter)
    context: Context = field(default_factory=copy_context)  # of its request's trace and log

    def goes_with(self, other: _Job) -> bool:
        """Whether both can share an inference: a graph takes one set of thresholds per run."""
        return (
            self.model is other.model
            and self.batch.shape[1:] == other.batch.shape[1:]
            and _same(self.params, other.params)
        )

    def run(self, batch: npt.NDArray[Any]) -> Outputs:
        """Run the model at these thresholds on a batch, which may hold images of other jobs."""
        if self.params is None:
            return self.model.run(batch)
        return self.model.run(batch, self.params.class_thresholds, self.params.iou_threshold)


class Scheduler:
    """Runs models for many requests. Methods must be called on the event loop.

    Args:
        settings: Provides `inferences`, `threads`, `queue_size`, `deadline_ms`, `batch_size` and
            `batch_wait_ms`.
        metrics: Observes waiting times, batches and refusals.

    Attributes:
        in_flight: Number of images that are admitted and not answered yet.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._jobs: deque[_Job] = deque()
        self._running = 0
        self._running_images = 0
        self._image_seconds = 0.0
        self._wakes: asyncio.TimerHandle | None = None
        self._open()
        self.in_flight = 0

    def _open(self) -> None:
        self._decoders = ThreadPoolExecutor(self._settings.threads, "decode")
        self._inferences = ThreadPoolExecutor(self._settings.inferences, "inference")

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Count the images of a request as in flight while it is worked on.

        Raises:
            ProblemError: 429 if too many are in flight, or these would wait beyond the deadline.
                `Retry-After` estimates when there is room.
        """
        self.check_room(images)
        self.in_flight += images
        try:
            yield
        finally:
            self.in_flight -= images

    def check_room(self, images: int = 1) -> None:
        """Refuse images for which there is no room.

        An idle service admits a request of any size, so that none is refused for ever.

        Raises:
            ProblemError: As for `admit`.
        """
        room = self._settings.queue_size + self._settings.inferences
        wait = self.in_flight * self._image_seconds / self._settings.inferences
        late = wait * 1000 > self._settings.deadline_ms
        if self.in_flight == 0 or (self.in_flight + images <= room and not late):
            return
        self._metrics.rejected("queue_full")
        raise ProblemError(
            429,
            f"busy: {self.in_flight} images are waiting or worked on, and at most {room} may be",
            {"Retry-After": str(max(1, math.ceil(wait)))},
        )

    async def decode(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a blocking function in a decoding thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, function, *arguments)

    async def run(
        self, model: ServedModel, batch: npt.NDArray[Any], params: DetectionParams | None = None
    ) -> Outputs:
        """Run a model on the images of a request, when their turn has come.

        Cancelling removes the images from the queue; an inference that has begun runs to its end,
        and its result is dropped.

        Args:
            model: The model.
            batch: As for `ServedModel.run`.
            params: Thresholds in force; None for the file's own.

        Returns:
            The outputs for these images, whichever others shared their inference.

        Raises:
            ValueError: The batch or a threshold is not valid for the model.
            ModelError: The inference failed.
        """
        answer: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(model, batch, params, answer))
        self._dispatch()
        return await answer

    def close(self) -> None:
        """Let the threads end after the work that has begun."""
        self._decoders.shutdown(wait=False)
        self._inferences.shutdown(wait=False)
        self._open()  # threads start with the first work, so an application can start again

    def _dispatch(self) -> None:
        """Give the first images in the queue to idle threads."""
        while self._running < self._settings.inferences:
            jobs = self._next()
            if not jobs:
                break
            self._start(jobs)
        self._metrics.queue(_images(self._jobs), self._running_images)

    def _next(self) -> list[_Job]:
        """Return the jobs of the next inference; none if the queue is empty or should fill up."""
        while self._jobs and self._jobs[0].answer.done():  # its request was cancelled
            self._jobs.popleft()
        if not self._jobs:
            return []
        first = self._jobs[0]
        most = self._batch_size(first.model)
        group, images = [first], len(first.batch)
        for job in list(self._jobs)[1:] if most > 1 else ():
            if not job.answer.done() and job.goes_with(first) and images + len(job.batch) <= most:
                group.append(job)
                images += len(job.batch)
        if images < most and self._worth_waiting(first):
            return []
        taken = {id(job) for job in group}
        self._jobs = deque(job for job in self._jobs if id(job) not in taken)
        return group

    def _batch_size(self, model: ServedModel) -> int:
        default = _BATCH_ON_CUDA if model.providers[0] == CUDA else 1
        return self._settings.batch_size or default

    def _worth_waiting(self, first: _Job) -> bool:
        """Whether other images may still arrive in time to share the first one's inference."""
        if self.in_flight <= _images(self._jobs) + self._running_images:
            return False  # no others are being read: all that is admitted waits here or runs
        left = self._settings.batch_wait_ms / 1000 - (perf_counter() - first.since)
        if left <= 0:
            return False
        if self._wakes is not None:
            self._wakes.cancel()
        self._wakes = asyncio.get_running_loop().call_later(left, self._dispatch)
        return True

    def _start(self, jobs: list[_Job]) -> None:
        loop = asyncio.get_running_loop()
        for job in jobs:
            job.context.run(self._metrics.stage, "queue", perf_counter() - job.since)
        images = _images(jobs)
        self._metrics.batch(images)
        self._running += 1
        self._running_images += images

        def work() -> None:
            started = perf_counter()
            answers = _run_together(jobs)
            seconds = perf_counter() - started
            loop.call_soon_threadsafe(self._finish, jobs, answers, seconds)

        self._inferences.submit(work)

    def _finish(self, jobs: list[_Job], answers: list[Outputs | Exception], seconds: float) -> None:
        images = _images(jobs)
        self._running -= 1
        self._running_images -= images
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
        each = seconds / images
        before = self._image_seconds or each
        self._image_seconds = before + _SMOOTHING * (each - before)
        jobs[0].context.run(self._metrics.stage, "inference", seconds)
        self._dispatch()


def _run_together(jobs: list[_Job]) -> list[Outputs | Exception]:
    """Run one inference for all jobs; if it fails, one per job, so that only one of them fails."""
    if len(jobs) == 1:
        return [_run_alone(jobs[0])]
    try:
        outputs = jobs[0].run(np.concatenate([job.batch for job in jobs]))
    except (ModelError, ValueError):
        return [_run_alone(job) for job in jobs]
    stops = np.cumsum([len(job.batch) for job in jobs]).tolist()
    return [outputs.part(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _run_alone(job: _Job) -> Outputs | Exception:
    try:
        return job.run(job.batch)
    except Exception as error:  # noqa: BLE001  raised in the task that awaits the answer
        return error


def _same(one: DetectionParams | None, other: DetectionParams | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.iou_threshold == other.iou_threshold and np.array_equal(
        one.class_thresholds, other.class_thresholds
    )


def _images(jobs: Iterable[_Job]) -> int:
    return sum(len(job.batch) for job in jobs)
