"""What each model has answered through this protocol, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter_ns, time
from typing import Any
from weakref import WeakKeyDictionary

from service.engine.session import ServedModel


@dataclass
class Duration:
    """How often something happened, and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, nanoseconds: int) -> None:
        """It has happened once more."""
        self.count += 1
        self.ns += nanoseconds


@dataclass
class ModelStatistics:
    """The counts of one model.

    Attributes:
        images: Answered.
        last_ms: When a request last succeeded, in milliseconds since 1970; 0 for never.
        parts: By the protocol's names. `compute_input` reads a request, `compute_infer` waits for
            a turn and runs the model, `compute_output` writes the answer.
    """

    images: int = 0
    last_ms: int = 0
    parts: dict[str, Duration] = field(
        default_factory=lambda: {
            name: Duration()
            for name in ("success", "fail", "compute_input", "compute_infer", "compute_output")
        }
    )

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request as a success, or as a failure where it raises."""
        started = perf_counter_ns()
        try:
            yield
        except BaseException:  # whoever goes away before the answer counts as a failure too
            self.parts["fail"].add(perf_counter_ns() - started)
            raise
        self.parts["success"].add(perf_counter_ns() - started)
        self.last_ms = round(time() * 1000)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of a part of a request that did not fail in it."""
        started = perf_counter_ns()
        yield
        self.parts[name].add(perf_counter_ns() - started)

    def shown(self, model: ServedModel) -> dict[str, Any]:
        """The counts as the protocol's statistics extension lays them out."""
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


# A model that was replaced begins again, as it does in other inference servers.
_KEPT: WeakKeyDictionary[ServedModel, ModelStatistics] = WeakKeyDictionary()


def statistics_of(model: ServedModel) -> ModelStatistics:
    """The counts of a model, from its first request on."""
    return _KEPT.setdefault(model, ModelStatistics())
