"""Processes that work off a list, each with its share of the cores; one that dies costs one item.

A process goes on after what it did well; after a failure a fresh one takes its place.

Not `concurrent.futures`, whose pool is of no more use once one of its processes was killed.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

PATIENCE = 10.0  # seconds that a process has to clear up
Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Result]


@dataclass(frozen=True)
class Failure:
    """An item that could not be worked off, and why, in one line."""

    reason: str


def work_off(
    work: Work[Item, Result],
    following: Callable[[], Item | None],
    workers: int,
    threads: int,
) -> Generator[tuple[Item, Result | Failure], None, None]:
    """Work off items in processes, and give each with its result as soon as it is there.

    Args:
        work: A function at the top of a module, called in a process with an item.
        following: The item to begin next; None for no more, now and ever after.
        workers: Processes.
        threads: Of torch, in each.

    Yields:
        Every item with its result, or with the `Failure` that it ended in.
    """
    idle: list[Worker[Item, Result]] = []
    busy: dict[Connection, tuple[Worker[Item, Result], Item]] = {}
    try:
        while True:
            while len(busy) < workers and (item := following()) is not None:
                worker = _begun(item, idle, work, threads)
                busy[worker.pipe] = (worker, item)
            if not busy:
                return
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                worker, item = busy.pop(pipe)
                result = worker.result()
                if isinstance(result, Failure):
                    worker.leave()  # what failed may have spoilt its process: CUDA's asserts do
                else:
                    idle.append(worker)
                yield item, result
    finally:
        for worker, _ in busy.values():
            worker.process.terminate()
        for worker in [*idle, *(worker for worker, _ in busy.values())]:
            worker.leave()


def _begun(
    item: Item, idle: list[Worker[Item, Result]], work: Work[Item, Result], threads: int
) -> Worker[Item, Result]:
    """Who works on an item: somebody idle, else, or where they have died, somebody new."""
    while idle:
        worker = idle.pop()
        try:
            worker.begin(item)
        except (BrokenPipeError, ConnectionResetError):
            worker.leave()
        else:
            return worker
    worker = Worker(work, threads)
    worker.begin(item)
    return worker


class Worker(Generic[Item, Result]):
    """One process, started afresh: CUDA does not survive a fork."""

    def __init__(self, work: Work[Item, Result], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, work, threads))
        # Ctrl-C is heard by a whole group of processes; the parent alone is to act on it.
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, heard)
        other.close()  # so that the pipe ends with the process

    def begin(self, item: Item) -> None:
        """Hand over the item to work on."""
        self.pipe.send(item)

    def result(self) -> Result | Failure:
        """What became of it; waits."""
        try:
            result: Result | Failure = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return Failure(f"the process ended with exit code {self.process.exitcode}")
        return result

    def leave(self) -> None:
        """Let the process end, which it does once nobody is left to ask it, and wait."""
        self.pipe.close()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, work: Work[Any, Any], threads: int) -> None:
    # An end, but an orderly one: temporary folders go with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            pipe.send(work(item))
        except Exception as error:  # noqa: BLE001 (recorded, and the others go on)
            pipe.send(Failure(_in_a_line(error)))


def _in_a_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = place.filename.replace("\\", "/").rsplit("/", 1)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({file}:{place.lineno})"
