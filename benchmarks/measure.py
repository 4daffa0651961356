"""Measure one case: every contender in every stage, in turns."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.loss_cases import SMALL, Case, Contender, Loss, contenders
from benchmarks.peers import dense_targets
from benchmarks.result_file import BOTH, COPY, FORWARD, GRAPH, SCALED, Row
from benchmarks.timing import Timing, Work, capture, input_sets, peak_bytes, race

FIRST = "first"  # the call before any stage
ANCHORS = ("released", "bce", "smooth_l1", "cross_entropy")  # losses to compare with
Sets = list[tuple[Tensor, Tensor]]
Label = tuple[str, str]  # loss and stage


@dataclass(frozen=True)
class Settings:
    """Extent of a measurement.

    Attributes:
        seconds: Approximate time per contender and stage.
        rounds: Turns per contender.
        compiler: Backend of `torch.compile`; None leaves compiled losses out.
    """

    seconds: float
    rounds: int
    compiler: str | None


class Runner:
    """A loss and its sets of inputs; every call takes the next."""

    def __init__(self, criterion: Loss, sets: Sets) -> None:
        self.criterion = criterion
        self._sets = itertools.cycle(sets)
        self._half = torch.tensor(0.5, device=sets[0][0].device)

    def forward(self) -> Tensor:
        """The loss."""
        pred, target = next(self._sets)
        return self.criterion(pred, target)

    def both(self) -> Tensor:
        """The gradient of the predictions."""
        pred, target = next(self._sets)
        # Not `backward()`: in a network the predictions are no leaf that collects its gradient.
        (gradient,) = torch.autograd.grad(self.criterion(pred, target), pred)
        return gradient

    def scaled(self) -> Tensor:
        """The gradient of half the loss."""
        pred, target = next(self._sets)
        loss = self.criterion(pred, target)
        (gradient,) = torch.autograd.grad(loss, pred, self._half.to(loss.dtype))
        return gradient


@dataclass(frozen=True)
class Ready:
    """A contender that has run once."""

    contender: Contender
    runner: Runner
    first: Row  # its first value and time


def measure(case: Case, settings: Settings, roof: float, skip: set[str]) -> Iterator[Row]:
    """Yield the rows of one case.

    Args:
        case: The problem.
        settings: Time and rounds.
        roof: Bandwidth of a large copy in GB/s.
        skip: Losses to skip.
    """
    if not case.dynamic:
        torch._dynamo.reset()  # or it stops compiling after a few shapes
    sets = [case.tensors(seed) for seed in range(input_sets(case.logits_bytes, case.device))]
    ready = yield from _ready(case, settings, sets, skip)
    timings = yield from _race(case, _works(ready, sets), settings)
    copied = timings.get((COPY, COPY))
    rate = _rate(2 * case.logits_bytes, copied) if copied else 0.0
    for (name, stage), timing in timings.items():
        row: Row = {"loss": name, "stage": stage, **figures(timing), "sets": len(sets)}
        if name == COPY:
            yield case.key | row | {"gb_per_s": rate}
            continue
        row |= ready[name].first | {"ratios": _ratios(timing, stage, timings)}
        if stage == BOTH:
            row |= {"backward_ms": timing.median - timings[name, FORWARD].median}
            row |= _bandwidth(case, name, timing, max(roof, rate))
            row |= _memory(case, ready[name].runner)
        yield case.key | row
    if case.device == "cuda" and case.entries <= SMALL:
        yield from _graphs(case, ready, len(sets), settings, roof)


def _ready(
    case: Case, settings: Settings, sets: Sets, skip: set[str]
) -> Generator[Row, None, dict[str, Ready]]:
    """Make the contenders; yield the rows of those that fail at once."""
    ready = {}
    for contender in contenders(case, settings.compiler):
        if contender.name in skip:
            continue
        try:
            runner = Runner(contender.make(), _served(case, contender, sets))
            start = time.perf_counter()
            value = float(runner.forward().detach())
            runner.both()
            took = time.perf_counter() - start
        except Exception as error:  # noqa: BLE001 - any failure of a peer is its result
            yield _failure(case, (contender.name, FIRST), error)
            continue
        first: Row = {"value": value, "first_s": round(took, 3)}
        if contender.compiled:
            first["dynamic"] = case.dynamic
        ready[contender.name] = Ready(contender, runner, first)
    return ready


def _served(case: Case, contender: Contender, sets: Sets) -> Sets:
    if not contender.dense or case.target == "dense":
        return sets
    return [(pred, dense_targets(pred.detach(), target)) for pred, target in sets]


def _works(ready: dict[str, Ready], sets: Sets) -> dict[Label, Work]:
    sources = itertools.cycle([pred.detach() for pred, _ in sets])
    destination = torch.empty_like(sets[0][0], requires_grad=False)
    works: dict[Label, Work] = {(COPY, COPY): lambda: destination.copy_(next(sources))}
    for name, each in ready.items():
        works[name, FORWARD], works[name, BOTH] = each.runner.forward, each.runner.both
        if each.contender.ours:
            works[name, SCALED] = each.runner.scaled
    return works


def _graphs(
    case: Case, ready: dict[str, Ready], sets: int, settings: Settings, roof: float
) -> Iterator[Row]:
    graphs: dict[Label, Work] = {}
    for name, each in ready.items():
        if not each.contender.capturable:
            continue
        try:
            graphs[name, GRAPH] = capture(each.runner.both, sets)
        except Exception as error:  # noqa: BLE001
            yield _failure(case, (name, GRAPH), error)
    replays = yield from _race(case, graphs, settings)
    timings = {label: timing.shared(sets) for label, timing in replays.items()}
    for (name, _), timing in timings.items():
        row: Row = {"loss": name, "stage": GRAPH, **figures(timing), "sets": sets}
        row |= {"ratios": _ratios(timing, GRAPH, timings)} | _bandwidth(case, name, timing, roof)
        yield case.key | row


def _race(
    case: Case, works: dict[Label, Work], settings: Settings
) -> Generator[Row, None, dict[Label, Timing]]:
    """Time in turns; yield the rows of failures. A loss that fails in a stage is in none."""
    timings, errors = race(works, case.device, settings.seconds, settings.rounds)
    for label, error in errors.items():
        yield _failure(case, label, error)
    failed = {name for name, _ in errors}
    return {label: timing for label, timing in timings.items() if label[0] not in failed}


def figures(timing: Timing) -> Row:
    """Return median, spread and number of calls for a row."""
    return {
        "median_ms": timing.median,
        "p20_ms": timing.quantile(0.2),
        "p80_ms": timing.quantile(0.8),
        "calls": len(timing.calls),
    }


def _ratios(timing: Timing, stage: str, timings: dict[Label, Timing]) -> dict[str, float]:
    """Ratios to each anchor in the same stage; of the scaled stage, to the plain one."""
    against = BOTH if stage == SCALED else stage
    return {
        name: timing.ratio(other)
        for (name, of), other in timings.items()
        if of == against and any(anchor in name for anchor in ANCHORS)
    }


def _bandwidth(case: Case, name: str, timing: Timing, roof: float) -> Row:
    per_entry = case.traffic(name)
    if per_entry is None:
        return {}
    rate = _rate(per_entry * math.prod(case.shape), timing)
    return {"bytes_per_entry": per_entry, "gb_per_s": rate, "share_of_copy": rate / roof}


def _rate(moved: int, timing: Timing) -> float:
    return moved / timing.median / 1e6


def _memory(case: Case, runner: Runner) -> Row:
    peak = peak_bytes(runner.both, case.device)
    ratio = None if peak is None else peak / case.logits_bytes
    return {"peak_bytes": peak, "peak_ratio": ratio}


def _failure(case: Case, label: Label, error: Exception) -> Row:
    name, stage = label
    # A loss that fails in one stage is timed in none: the row takes the place of its figure.
    place = {"loss": name, "stage": stage if stage in (COPY, GRAPH) else BOTH, "failed_in": stage}
    return case.key | place | {"error": f"{type(error).__name__}: {error}"[:500]}
