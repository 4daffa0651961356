"""Queueing and batching: inference and decoding off the event loop.

Images wait in one bounded queue, first come, first served. A few threads run inferences; with
batching, images of several requests that use the same thresholds share one. A request that would
wait longer than it may is refused at once, with the time after which to retry.
"""

from __future__ import annotations

import asyncio
import logging
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
import onnxruntime

from service.core.detections import DetectionParams, Outputs
from service.core.errors import ProblemError
from service.core.settings import Settings
from service.engine.session import CUDA, ModelError, ServedModel
from service.observability.metrics import Metrics

T = TypeVar("T")

logger = logging.getLogger("ghm.service")

# On an accelerator, a batch costs little more than one image.
_BATCH_ON_CUDA = 8

# Time that an inference gets to end once it was told to, before its slot is freed.
_GRACE_SECONDS = 2.0

# Weight of the latest measurement in the estimated time per image.
_SMOOTHING = 0.1


@dataclass(eq=False)
class _Job:
    """Images of one request, waiting for their inference."""

    model: ServedModel
    batch: npt.NDArray[Any]
    params: DetectionParams | None
    answer: asyncio.Future[Outputs]
    on_start: Callable[[float], None] | None = None
    since: float = field(default_factory=perf_counter)
    context: Context = field(default_factory=copy_context)  # of its request's trace and log

    def goes_with(self, other: _Job) -> bool:
        """Whether both can share an inference: a graph takes one set of thresholds per run."""
        return (
            self.model is other.model
            and self.batch.shape[1:] == other.batch.shape[1:]
            and _same(self.params, other.params)
        )

    def run(self, batch: npt.NDArray[Any], options: onnxruntime.RunOptions) -> Outputs:
        """Run the model at these thresholds on a batch, which may hold images of other jobs."""
        if self.params is None:
            return self.model.run(batch, options=options)
        thresholds = self.params.class_thresholds, self.params.iou_threshold
        return self.model.run(batch, *thresholds, options=options)


@dataclass(eq=False)
class _Run:
    """An inference in progress.

    Attributes:
        jobs: The jobs that share it.
        images: Number of their images.
        options: Its options, with which it can be ended.
        limit: Fires when it takes too long.
        abandoned: Whether its slot was freed while it went on.
    """

    jobs: list[_Job]
    images: int
    options: onnxruntime.RunOptions = field(default_factory=onnxruntime.RunOptions)
    limit: asyncio.TimerHandle | None = None
    abandoned: bool = False


class Scheduler:
    """Runs models for many requests. Methods must be called on the event loop.

    Args:
        settings: Provides `inferences`, `threads`, `queue_size`, `deadline_ms`, `batch_size` and
            `batch_wait_ms`.
        metrics: Observes waiting times, batches and refusals.

    Attributes:
        in_flight: Number of images that are admitted and not answered yet.
        stuck: Models with an inference that does not end. They get no further ones.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._jobs: deque[_Job] = deque()
        self._running = 0
        self._running_images = 0
        self._image_seconds = 0.0
        self._wakes: asyncio.TimerHandle | None = None
        self._runs: set[_Run] = set()
        self._open()
        self.in_flight = 0
        self.stuck: set[ServedModel] = set()

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
        self,
        model: ServedModel,
        batch: npt.NDArray[Any],
        params: DetectionParams | None = None,
        on_start: Callable[[float], None] | None = None,
    ) -> Outputs:
        """Run a model on the images of a request, when their turn has come.

        Cancelling removes the images from the queue; an inference that has begun runs to its end,
        and its result is dropped. One that takes longer than a request may is ended.

        Args:
            model: The model.
            batch: As for `ServedModel.run`.
            params: Thresholds in force; None for the file's own.
            on_start: Called with the seconds that the images waited, when their inference begins.

        Returns:
            The outputs for these images, whichever others shared their inference.

        Raises:
            ValueError: The batch or a threshold is not valid for the model.
            ModelError: The inference failed.
            ProblemError: 503 if an earlier inference of the model does not end.
        """
        if model in self.stuck:
            raise ProblemError(503, f"not ready: {stuck_reason(model)}", {"Retry-After": "5"})
        answer: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._jobs.append(_Job(model, batch, params, answer, on_start))
        self._dispatch()
        return await answer

    def close(self) -> None:
        """End the inferences in progress, and let the threads end."""
        for run in self._runs:
            run.options.terminate = True
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
        most = self.batch_size(first.model)
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

    def batch_size(self, model: ServedModel) -> int:
        """Return the most images in one inference of a model."""
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
            waited = perf_counter() - job.since
            job.context.run(self._metrics.stage, "queue", waited)
            if job.on_start is not None:
                job.on_start(waited)
        run = _Run(jobs, _images(jobs))
        self._metrics.batch(run.images)
        self._running += 1
        self._running_images += run.images
        self._runs.add(run)
        # By then the requests of all its jobs are past their deadlines.
        run.limit = loop.call_later(self._settings.deadline_ms / 1000, self._end, run)

        def work() -> None:
            started = perf_counter()
            answers = _run_together(jobs, run.options)
            seconds = perf_counter() - started
            loop.call_soon_threadsafe(self._finish, run, answers, seconds)

        self._inferences.submit(work)

    def _end(self, run: _Run) -> None:
        """End an inference that takes too long."""
        logger.error("an inference of %s takes too long; ending it", run.jobs[0].model.name)
        run.options.terminate = True
        run.limit = asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._abandon, run)

    def _abandon(self, run: _Run) -> None:
        """Free the slot of an inference that cannot be ended, as one operator does not return."""
        model = run.jobs[0].model
        logger.critical(stuck_reason(model))
        run.abandoned = True
        self.stuck.add(model)
        self._running -= 1
        self._running_images -= run.images
        self._inferences.shutdown(wait=False)  # its other inferences go on, in their threads
        self._inferences = ThreadPoolExecutor(self._settings.inferences, "inference")
        waiting = [job for job in self._jobs if job.model is model]
        for job in [*run.jobs, *waiting]:
            if not job.answer.done():
                job.answer.set_exception(ModelError(stuck_reason(model)))
        self._dispatch()

    def _finish(self, run: _Run, answers: list[Outputs | Exception], seconds: float) -> None:
        self._runs.discard(run)
        if run.limit is not None:
            run.limit.cancel()
        if run.abandoned:
            model = run.jobs[0].model
            if not any(other.abandoned and other.jobs[0].model is model for other in self._runs):
                self.stuck.discard(model)
            return
        self._running -= 1
        self._running_images -= run.images
        for job, answer in zip(run.jobs, answers, strict=True):
            if job.answer.done():
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
        each = seconds / run.images
        before = self._image_seconds or each
        self._image_seconds = before + _SMOOTHING * (each - before)
        run.jobs[0].context.run(self._metrics.stage, "inference", seconds)
        self._dispatch()


def stuck_reason(model: ServedModel) -> str:
    """Describe a model with an inference that does not end."""
    return f"an inference of {model.name!r} does not end"


def _run_together(jobs: list[_Job], options: onnxruntime.RunOptions) -> list[Outputs | Exception]:
    """Run one inference for all jobs; if it fails, one per job, so that only one of them fails."""
    if len(jobs) == 1:
        return [_run_alone(jobs[0], options)]
    try:
        outputs = jobs[0].run(np.concatenate([job.batch for job in jobs]), options)
    except (ModelError, ValueError):
        return [_run_alone(job, options) for job in jobs]
    stops = np.cumsum([len(job.batch) for job in jobs]).tolist()
    return [outputs.part(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _run_alone(job: _Job, options: onnxruntime.RunOptions) -> Outputs | Exception:
    try:
        return job.run(job.batch, options)
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
