"""What happens beside the steps of a training run: metrics, statistics, checkpoints, reports."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ghm_triton.detection.evaluate import (
    detect,
    mean_average_precision,
    observe,
    torch_predictor,
)
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.training.build import REPORT_EVERY, Run
from ghm_triton.detection.training.checkpoint import CHECKPOINT, save_run
from ghm_triton.diagnosis import warn_of
from ghm_triton.evidence import ClassStatistics
from ghm_triton.extras import how_to_install
from ghm_triton.losses.density import GradientDensity
from ghm_triton.monitor import DensityMonitor, PositivesMonitor, find_densities

METRICS = "metrics.jsonl"
OPTIMISER = ("grad_norm", "lr")  # scalars of a record that are not losses


class TrainingError(ArithmeticError):
    """Training cannot continue; the last checkpoint on disk is sound."""


class Hook:
    """Something to do in a run; every method is optional."""

    def after_step(self, run: Run) -> None:
        """Called after each step, when `run.step` steps are done and `run.record` is the last."""

    def after_training(self, run: Run) -> None:
        """Called when the last step is done."""

    def close(self) -> None:
        """Called at the end, whether the run succeeded or failed."""


class Progress(Hook):
    """A progress bar with the last losses."""

    def __init__(self, run: Run, shown: bool) -> None:
        self.bar = tqdm(
            total=run.options.steps,
            initial=run.step,
            desc="train",
            unit="step",
            disable=not (shown and run.world.leads),
        )

    def after_step(self, run: Run) -> None:
        """Advance the bar."""
        self.bar.update()
        if run.metrics:
            last = run.metrics[-1]
            self.bar.set_postfix(
                cls=f"{last['classification']:.3f}", reg=f"{last['bbox_regression']:.3f}"
            )

    def after_training(self, run: Run) -> None:
        """Close the bar, before anything else is printed."""
        del run
        self.bar.close()

    def close(self) -> None:
        """Close the bar."""
        self.bar.close()


class Metrics(Hook):
    """Writes a line per step to `metrics.jsonl`, in batches, so that steps need not wait."""

    def __init__(self, run: Run, resume: bool) -> None:
        self.pending: list[dict[str, Any]] = []
        if run.world.leads:
            path = run.out / METRICS
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume:
                keep_steps(path, run.step)
            else:
                path.unlink(missing_ok=True)
        self.first, self.started = run.step, time.perf_counter()

    def after_step(self, run: Run) -> None:
        """Wait for the device now and then, and write what is pending."""
        self.pending.append({"step": run.step - 1, **run.record})
        run.metrics = []
        if run.synchronizes or run.saves:
            run.metrics = [{k: float(v) for k, v in record.items()} for record in self.pending]
            self.pending.clear()
            if run.world.leads:
                with (run.out / METRICS).open("a") as stream:
                    for line in run.metrics:
                        stream.write(json.dumps({**line, "step": int(line["step"])}) + "\n")
        if run.synchronizes:
            now = time.perf_counter()
            run.step_seconds.append((now - self.started) / (run.step - self.first))
            self.first, self.started = run.step, now


class RequireFinite(Hook):
    """Stops a run whose loss or gradient is not finite, before it is saved."""

    def after_step(self, run: Run) -> None:
        """Raise TrainingError for a step that is not finite; fp16's scaler skips such steps."""
        for line in run.metrics if run.options.amp != "fp16" else ():
            if not all(map(math.isfinite, line.values())):
                raise TrainingError(
                    f"step {int(line['step'])}: {line} is not finite. Lower --lr or --clip;"
                    f" the last sound checkpoint, if any, is {run.out / CHECKPOINT}"
                )


class DensityWarnings(Hook):
    """Warns, once each, of gradient densities that do not suit the batches."""

    def __init__(self) -> None:
        self.warned: set[str] = set()

    def after_step(self, run: Run) -> None:
        """Look at the densities where the run waits for the device anyway."""
        if run.world.leads and run.step % REPORT_EVERY == 0 and run.step >= run.options.warmup:
            for module in run.detector.modules():
                if isinstance(module, GradientDensity):
                    warn_of(module, self.warned)


class LabelCounts(Hook):
    """Counts the labels that the classification is trained on, on the device."""

    def __init__(self, run: Run) -> None:
        size = run.config.num_classes + 2  # slot 0 is for ignored entries
        self.seen = torch.zeros(size, dtype=torch.int64, device=run.world.device)
        run.detector.observe_labels(self.observe)

    def observe(self, labels: Tensor) -> None:
        """Count labels of any shape: `C` is background, -1 is ignored."""
        slots = (labels.clamp(min=-1) + 1).flatten()
        self.seen.scatter_add_(0, slots, torch.ones_like(slots))

    def total(self, run: Run) -> Tensor:
        """Counts of all processes since the last checkpoint, int64 `[C + 1]`, background last."""
        return torch.stack(run.world.gather(self.seen.cpu())).sum(0)[1:]

    def after_step(self, run: Run) -> None:
        """Move the counts to the statistics before they are saved."""
        if run.saves:
            run.statistics.add_labels(self.total(run))
            self.seen.zero_()


class TensorBoard(Hook):
    """Writes the losses, densities, positives and average precision for TensorBoard.

    Steps are numbered from 0, as in `metrics.jsonl`; reports between steps by the last one done.

    Args:
        run: The run. Events of its folder from later steps are void, since they will be repeated.
        counts: Counts the labels.
        folder: Folder of the event files, which are added to.
    """

    def __init__(self, run: Run, counts: LabelCounts, folder: Path) -> None:
        self.counts, self.counted = counts, _labels_of(run.statistics)
        self.writer: Any = None
        if run.world.leads:
            from torch.utils.tensorboard import SummaryWriter  # an extra

            self.writer = SummaryWriter(str(folder), purge_step=run.step)
            self.positives = PositivesMonitor(self.writer, run.config.class_names)
            monitored = find_densities(run.detector)
            self.densities = DensityMonitor(self.writer, run.detector) if monitored else None

    def after_step(self, run: Run) -> None:
        """Write the new metrics, and a report where the run waits for the device."""
        if self.writer is not None:
            for record in run.metrics:
                self._write(record)
        if run.synchronizes:
            labels = self.counts.total(run)  # of every process, so every process takes part
            if self.writer is not None:
                self._report(run, labels)

    def _write(self, record: dict[str, float]) -> None:
        step = int(record["step"])
        losses = {k: v for k, v in record.items() if k not in ("step", *OPTIMISER)}
        # Unguided losses are shown beside those that are trained by, and are no part of the total.
        total = sum(v for k, v in losses.items() if not k.startswith("unguided_"))
        for name, value in {**losses, "total": total}.items():
            self.writer.add_scalar(f"loss/{name}", value, step)
        for name in OPTIMISER:
            self.writer.add_scalar(f"optimiser/{name}", record[name], step)

    def _report(self, run: Run, labels: Tensor) -> None:
        step = run.step - 1
        self.writer.add_scalar("optimiser/step_ms", 1000 * run.step_seconds[-1], step)
        counted = _labels_of(run.statistics) + labels
        self.positives.log_counts(counted - self.counted, step)
        self.counted = counted
        if self.densities:
            self.densities.log(step, problems=run.step >= run.options.warmup)

    def after_training(self, run: Run) -> None:
        """Write the average precision of the finished detector, and that of each class."""
        if self.writer is None or run.held_out is None:
            return
        result = run.held_out
        scores = {"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75}
        scores = {f"held_out/{name}": score for name, score in scores.items()}
        for name, (ap, ap50) in result.per_class.items():
            scores |= {f"held_out_AP/{name}": ap, f"held_out_AP50/{name}": ap50}
        for tag, score in scores.items():
            if not math.isnan(score):  # a class without held-out boxes has none
                self.writer.add_scalar(tag, score, run.step)

    def close(self) -> None:
        """Close the event file, of a failed run too."""
        if self.writer is not None:
            self.writer.close()


class HeldOut(Hook):
    """Evaluates a finished detector on the held-out split and counts its scores."""

    def after_training(self, run: Run) -> None:
        """Fill `run.held_out` and the held-out part of the statistics."""
        if run.world.leads and run.finished:
            predict = torch_predictor(DeployedDetector(run.detector))
            results = list(detect(predict, run.config, run.splits.held_out))
            observe(run.statistics, results)
            run.held_out = mean_average_precision(run.config.class_names, results)


class Checkpointing(Hook):
    """Saves the run now and then, and once more when it has been evaluated."""

    def after_step(self, run: Run) -> None:
        """Save every `checkpoint_every` steps, and after the last."""
        if run.world.leads and run.saves:
            save_run(run)

    def after_training(self, run: Run) -> None:
        """Save the held-out statistics of a finished run."""
        if run.world.leads and run.finished:
            save_run(run)


def default_hooks(
    run: Run, *, resume: bool, progress: bool, tensorboard: Path | None
) -> list[Hook]:
    """The hooks of a run, in the order in which they are called.

    Metrics come first, since others read them; a run is checked before it is saved, after its
    curves have been written.
    """
    counts = LabelCounts(run)
    board = [TensorBoard(run, counts, tensorboard)] if tensorboard is not None else []
    return [
        Metrics(run, resume),
        Progress(run, progress),
        HeldOut(),
        *board,
        RequireFinite(),
        DensityWarnings(),
        counts,
        Checkpointing(),
    ]


def keep_steps(path: Path, steps: int) -> None:
    """Drop the metrics of steps that a resumed run will repeat.

    Raises:
        ValueError: A line is damaged; the message names it.
    """
    if path.exists():
        # The text behind the last line break is empty, or part of a line that a killed run could
        # not finish. That step comes after the checkpoint, before which whole lines are written.
        finished = path.read_text(errors="replace").split("\n")[:-1]
        kept = [x for n, x in enumerate(finished, 1) if _step_of(x, f"{path}, line {n}") < steps]
        path.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str, where: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is damaged: {line[:60]!r}. Repair or remove that line, or move the file"
            " away to resume without the metrics so far"
        ) from error


def _labels_of(statistics: ClassStatistics) -> Tensor:
    background = statistics.anchors - int(statistics.positives.sum())
    return torch.tensor([*statistics.positives.tolist(), background])


def require_tensorboard() -> None:
    """Raise ValueError, with the extra to install, if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(f"TensorBoard is not installed: {how_to_install('tensorboard')}")
