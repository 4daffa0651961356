"""Timing in turns, round after round, so that noise affects all contenders alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)
MOST_REPEATS = 200  # per contender and round


@dataclass(frozen=True)
class Timing:
    """Milliseconds of every call.

    Attributes:
        rounds: One list per round; none is empty.
    """

    rounds: tuple[tuple[float, ...], ...]

    @property
    def calls(self) -> list[float]:
        """The calls of all rounds."""
        return [ms for each in self.rounds for ms in each]

    @property
    def median(self) -> float:
        """Median of all calls."""
        return statistics.median(self.calls)

    def quantile(self, share: float) -> float:
        """Quantile of all calls; `share` in [0, 1]."""
        ordered = sorted(self.calls)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def ratio(self, other: Timing) -> float:
        """Median over rounds of the ratio of this time to `other`."""
        pairs = zip(self.rounds, other.rounds, strict=True)
        return statistics.median(
            statistics.median(mine) / statistics.median(theirs) for mine, theirs in pairs
        )

    def shared(self, calls: int) -> Timing:
        """Time of one of the `calls` that each measured call consists of."""
        return Timing(tuple(tuple(ms / calls for ms in each) for each in self.rounds))


def race(
    contenders: Mapping[Name, Work],
    device: str,
    seconds: float,
    rounds: int,
) -> tuple[dict[Name, Timing], dict[Name, Exception]]:
    """Time contenders in turns.

    Args:
        contenders: Contenders by name. Each is called twice before it is timed.
        device: `cuda` times with events on the device, `cpu` by the clock.
        seconds: Approximate time per contender; a slow one is still called once per round.
        rounds: Turns per contender.

    Returns:
        The times of those that never failed, and the errors of the others.
    """
    repeats: dict[Name, int] = {}
    errors: dict[Name, Exception] = {}
    for name, work in contenders.items():
        try:
            burst(work, 1, device)
            (estimate,) = burst(work, 1, device)
        except Exception as error:  # noqa: BLE001 - any failure of a peer is its result
            errors[name] = error.with_traceback(None)  # which would keep memory alive
            continue
        share = seconds * 1000 / rounds / max(estimate, 1e-6)
        repeats[name] = max(1, min(MOST_REPEATS, round(share)))
    taken: dict[Name, list[tuple[float, ...]]] = {name: [] for name in repeats}
    for _ in range(rounds):
        for name in [name for name in repeats if name not in errors]:
            try:
                taken[name].append(burst(contenders[name], repeats[name], device))
            except Exception as error:  # noqa: BLE001
                errors[name] = error.with_traceback(None)
    timings = {name: Timing(tuple(each)) for name, each in taken.items() if name not in errors}
    return timings, errors


def burst(work: Work, calls: int, device: str) -> tuple[float, ...]:
    """Time several consecutive calls, in milliseconds each."""
    if device != "cuda":
        return tuple(_by_the_clock(work) for _ in range(calls))
    marks = [(_event(), _event()) for _ in range(calls)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) for start, end in marks)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _by_the_clock(work: Work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def capture(work: Work, calls: int) -> Work:
    """Capture `calls` calls of `work` in a CUDA graph; the result replays them."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return graph.replay


def peak_bytes(work: Work, device: str) -> int | None:
    """Peak memory that `work` allocates on the GPU; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(device: str, seconds: float) -> float:
    """Bandwidth of a copy larger than any cache, read and written, in GB/s."""
    source = torch.randn(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    timings, errors = race({"copy": lambda: target.copy_(source)}, device, seconds, rounds=3)
    if errors:
        raise errors["copy"]
    return 2 * source.nbytes / timings["copy"].median / 1e6


def input_sets(set_bytes: int, device: str) -> int:
    """Number of input sets to rotate, so that none is still in the GPU's cache."""
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(torch.device(device)).L2_cache_size
    return max(1, min(128, math.ceil(4 * cache / set_bytes)))


def device_is_well(device: str) -> bool:
    """Whether the device still works: some errors make all later calls fail."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
