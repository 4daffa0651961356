"""Work off a list, each item in a process of its own with its share of the cores.

Unlike `concurrent.futures`, whose pool breaks when one of its processes is killed, a process that
dies fails one item.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

PATIENCE = 10.0  # seconds that a process has to clean up
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failure:
    """Result of an item that could not be worked off.

    Attributes:
        reason: The error in one line.
    """

    reason: str


def work_off(
    work: Callable[[Item], Result],
    following: Callable[[], Item | None],
    workers: int,
    threads: int,
) -> Generator[tuple[Item, Result | Failure], None, None]:
    """Work off items in processes and yield each with its result as soon as it is complete.

    Args:
        work: A function at the top of a module, called in a process with an item.
        following: Returns the next item; None when there are no more.
        workers: Number of processes at a time.
        threads: Threads of torch in each.

    Yields:
        Every item with its result, or with the `Failure` that it ended in.
    """
    running: dict[Connection, tuple[BaseProcess, Item]] = {}
    try:
        while True:
            while len(running) < workers and (item := following()) is not None:
                pipe, process = _start(work, item, threads)
                running[pipe] = process, item
            if not running:
                return
            for pipe in [pipe for pipe in wait(list(running)) if isinstance(pipe, Connection)]:
                process, item = running.pop(pipe)
                yield item, _result(pipe, process)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            _end(process)


def _start(work: Callable[[Any], Any], item: Any, threads: int) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pipe, other = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(other, work, item, threads))
    # Ctrl-C reaches the whole process group; only the parent acts on it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    other.close()  # so that the pipe ends with the process
    return pipe, process


def _result(pipe: Connection, process: BaseProcess) -> Any:
    try:
        result = pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return Failure(f"the process ended with exit code {process.exitcode}")
    _end(process)
    return result


def _end(process: BaseProcess) -> None:
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()


def _run(pipe: Connection, work: Callable[[Any], Any], item: Any, threads: int) -> None:
    # Exit in order, so that temporary folders are removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(threads)
    try:
        result = work(item)
    except Exception as error:  # noqa: BLE001 (recorded; the other items go on)
        result = Failure(_in_a_line(error))
    pipe.send(result)


def _in_a_line(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    file = place.filename.replace("\\", "/").rsplit("/", 1)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({file}:{place.lineno})"
