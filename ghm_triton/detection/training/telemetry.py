"""A training run on TensorBoard: its losses, its densities, its positives, its AP."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.evidence import ClassStatistics
from ghm_triton.monitor import DensityMonitor, PositivesMonitor, find_densities

OPTIMISER = ("grad_norm", "lr")  # what a record holds beside its step and its losses


class Telemetry:
    """Writes a run down for TensorBoard; without a folder, does nothing.

    Steps are numbered as in `metrics.jsonl`, from 0, and what is looked at between them by the
    steps that are done.

    Args:
        folder: Where event files go; one that holds some is gone on with. None: nowhere.
        model: Whose densities are watched, if it has any.
        statistics: What was counted in the steps that are done.
        step: Steps that are done. What the folder holds of later ones is void: they will be made
            again.
    """

    def __init__(
        self, folder: Path | None, model: nn.Module, statistics: ClassStatistics, step: int
    ) -> None:
        self.writer: Any = None
        if folder is None:
            return
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=step)
        self.positives = PositivesMonitor(self.writer, statistics.class_names)
        self.counted = _labels_of(statistics)
        # Other losses than GHM have none.
        self.densities = DensityMonitor(self.writer, model) if find_densities(model) else None

    def steps(self, records: Iterable[Mapping[str, float]]) -> None:
        """Write the losses of steps down, their total, the gradient's norm and the rate.

        Args:
            records: As in `metrics.jsonl`.
        """
        if self.writer is None:
            return
        for record in records:
            step = int(record["step"])
            losses = {k: v for k, v in record.items() if k not in ("step", *OPTIMISER)}
            # What a guide found is shown beside what is learnt by, and is no part of it.
            total = sum(v for k, v in losses.items() if not k.startswith("unguided_"))
            for name, value in {**losses, "total": total}.items():
                self.writer.add_scalar(f"loss/{name}", value, step)
            for name in OPTIMISER:
                self.writer.add_scalar(f"optimiser/{name}", record[name], step)

    def look(
        self,
        step: int,
        statistics: ClassStatistics,
        labels: Tensor,
        seconds: float,
        *,
        problems: bool,
    ) -> None:
        """Write down what the densities have come to, and what was counted since the last look.

        Args:
            step: The last one that was made.
            statistics: What was counted up to the last checkpoint.
            labels: int64 `[C + 1]`, counted since then: of every class, then of background.
            seconds: That a step took, of late.
            problems: Whether the densities should be well by now.
        """
        if self.writer is None:
            return
        self.writer.add_scalar("optimiser/step_ms", 1000 * seconds, step)
        counted = _labels_of(statistics) + labels
        self.positives.log_counts(counted - self.counted, step)
        self.counted = counted
        if self.densities:
            self.densities.log(step, problems=problems)

    def held_out(self, step: int, result: MeanAveragePrecision) -> None:
        """Write the average precision of the finished detector down, and that of every class."""
        if self.writer is None:
            return
        scores = {
            "held_out/AP": result.ap,
            "held_out/AP50": result.ap50,
            "held_out/AP75": result.ap75,
        }
        for name, (ap, ap50) in result.per_class.items():
            scores |= {f"held_out_AP/{name}": ap, f"held_out_AP50/{name}": ap50}
        for tag, score in scores.items():
            if not math.isnan(score):  # as of a class that is not held out
                self.writer.add_scalar(tag, score, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # A run that fails leaves its curves too.
        if self.writer is not None:
            self.writer.close()


def _labels_of(statistics: ClassStatistics) -> Tensor:
    background = statistics.anchors - int(statistics.positives.sum())
    return torch.tensor([*statistics.positives.tolist(), background])


def require_tensorboard() -> None:
    """Refuse to go on without TensorBoard.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec("tensorboard") is None:
        raise ValueError("TensorBoard is not installed: pip install 'ghm-triton[tensorboard]'")
