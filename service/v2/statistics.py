"""Counts and times of each model's requests through this protocol, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns, time
from typing import Any
from weakref import WeakKeyDictionary

from service.engine.session import ServedModel

_PARTS = (
    *("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"),
    *("cache_hit", "cache_miss"),  # of the protocol; there is no cache
)


@dataclass
class Duration:
    """A number of events and their total time."""

    count: int = 0
    ns: int = 0

    def add(self, nanoseconds: int) -> None:
        """Count one event."""
        self.count += 1
        self.ns += nanoseconds


@dataclass
class ModelStatistics:
    """The counts of one model.

    Attributes:
        images: Images answered.
        last_ms: Time of the last success, in milliseconds since 1970; 0 for never.
        parts: By the protocol's names. `compute_input` reads a request, `queue` is the wait for a
            turn, `compute_infer` runs the model, `compute_output` encodes the answer.
    """

    images: int = 0
    last_ms: int = 0
    parts: dict[str, Duration] = field(
        default_factory=lambda: {name: Duration() for name in _PARTS}
    )

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count the request within the context as a success, or as a failure if it raises."""
        started = perf_counter_ns()
        try:
            yield
        except BaseException:  # a client that disconnects is a failure too
            self.parts["fail"].add(perf_counter_ns() - started)
            raise
        self.parts["success"].add(perf_counter_ns() - started)
        self.last_ms = round(time() * 1000)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a part of a request, unless it raises."""
        started = perf_counter_ns()
        yield
        self.parts[name].add(perf_counter_ns() - started)

    @contextmanager
    def inference(self) -> Iterator[Callable[[float], None]]:
        """Count the time of an inference, unless it raises.

        Yields:
            A function to be called with the seconds of each wait for a turn.
        """
        waits: list[int] = []
        started = perf_counter_ns()
        yield lambda seconds: waits.append(round(seconds * 1e9))
        self.parts["queue"].add(sum(waits))
        self.parts["compute_infer"].add(max(0, perf_counter_ns() - started - sum(waits)))

    def to_dict(self, model: ServedModel) -> dict[str, Any]:
        """Return the counts in the layout of the protocol's statistics extension."""
        return {
            "name": model.name,
            "version": model.version,
            "last_inference": self.last_ms,
            "inference_count": self.images,
            "execution_count": self.parts["success"].count,
            "inference_stats": {
                name: {"count": part.count, "ns": part.ns} for name, part in self.parts.items()
            },
        }


# A replaced model starts from zero, as in other inference servers.
_STATISTICS: WeakKeyDictionary[ServedModel, ModelStatistics] = WeakKeyDictionary()


def statistics_of(model: ServedModel) -> ModelStatistics:
    """Return the counts of a model."""
    return _STATISTICS.setdefault(model, ModelStatistics())
