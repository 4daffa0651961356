"""The training loop: steps, checkpoints, and the statistics that thresholds come from."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import ghm_triton
from ghm_triton.detection.data import DetectionDataset, open_dataset
from ghm_triton.detection.data.loader import Batch, StepSampler, TrainingView, training_loader
from ghm_triton.detection.evaluate import (
    MeanAveragePrecision,
    detect,
    mean_average_precision,
    observe,
    torch_predictor,
)
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.models.postprocess import DeployedDetector
from ghm_triton.detection.models.registry import build_detector, channels_last
from ghm_triton.detection.training.build import AMP, build_losses, build_optimizer
from ghm_triton.detection.training.checkpoint import Checkpoint
from ghm_triton.detection.training.compatibility import require_fitting
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.distributed import World, world
from ghm_triton.detection.training.priors import start_at_prior, start_proposals
from ghm_triton.detection.training.telemetry import Telemetry, require_tensorboard
from ghm_triton.diagnosis import warn_of
from ghm_triton.evidence import ClassStatistics
from ghm_triton.losses.density import GradientDensity

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
LOOK_EVERY = 20  # steps between waits for the device


class TrainingError(ArithmeticError):
    """Training cannot go on; the last checkpoint on disk is sound."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        checkpoint: The checkpoint's path.
        held_out: AP on the held-out split.
        step_seconds: Mean duration of a step in seconds, batches and checkpoints included, of
            every `LOOK_EVERY` steps that this call made: what lies between waits for the device.
    """

    checkpoint: Path
    held_out: MeanAveragePrecision | None
    step_seconds: tuple[float, ...] = ()


def train(
    options: TrainOptions,
    config: DetectorConfig,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
    stop_after: int | None = None,
    tensorboard: Path | None = None,
) -> TrainResult:
    """Train a detector, and count what its thresholds will be derived from.

    Args:
        options: How.
        config: What.
        out: Folder for `checkpoint.pt` and `metrics.jsonl` (one JSON line a step).
        resume: Go on from the checkpoint in `out`; the losses are those of an unbroken run.
        device: `auto`, `cpu` or `cuda`.
        progress: Whether to draw a bar.
        stop_after: Stop, as if interrupted, once this many steps are done.
        tensorboard: Folder for TensorBoard's event files; None: none.

    Returns:
        Where the checkpoint is, and AP on the held-out split (on the first process).

    Raises:
        ValueError: The data set or an option does not fit, what is to be resumed is damaged, or
            TensorBoard is not installed.
        TrainingError: The loss or the gradient is no longer finite.
    """
    if tensorboard is not None:
        require_tensorboard()
    stop = options.steps if stop_after is None else min(options.steps, stop_after)
    with world(device) as here:
        run = _Run(options, config, out, here, resume, tensorboard)
        with run.telemetry:
            run.fit(stop, progress)
            held_out = run.score_held_out() if run.step >= options.steps else None
        if here.leads and run.step >= options.steps:
            run.save()
        return TrainResult(out / CHECKPOINT, held_out, tuple(run.step_seconds))


class _Run:
    """One run in this process."""

    def __init__(
        self,
        options: TrainOptions,
        config: DetectorConfig,
        out: Path,
        here: World,
        resume: bool,
        tensorboard: Path | None,
    ) -> None:
        require_fitting(options, config.architecture, config.classifier, config.assigner)
        options = options.settled(config.architecture)
        self.options, self.out, self.here = options, out, here
        self.dataset = open_split(options, options.train_split, config.class_names)
        # Opened before training, so that a mistake in its name does not cost a run.
        self.held_out = open_split(options, options.val_split, config.class_names)
        if here.leads:
            warn_of_shared_images(self.dataset, self.held_out)
        config = start_at_prior(options, config, self.dataset, out, resume=resume)
        self.config = config
        torch.manual_seed(options.seed)
        losses = build_losses(
            options,
            here.group,
            architecture=config.architecture,
            classifier=config.classifier,
            assigner=config.assigner,
        )
        self.detector = build_detector(config, losses)
        if not resume:
            start_proposals(options, self.detector, self.dataset, out)
        channels_last(self.detector).to(here.device)
        self.optimizer = build_optimizer(options, self.detector)
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=options.amp == "fp16")
        self.statistics = ClassStatistics(config.class_names)
        self.labels_seen = torch.zeros(
            config.num_classes + 2, dtype=torch.int64, device=here.device
        )
        self.detector.observe_labels(self._see_labels)
        self.step = 0
        self.pending: list[dict[str, Any]] = []
        self.warned: set[str] = set()
        self.step_seconds: list[float] = []
        if resume:
            self._resume()
        elif here.leads:
            out.mkdir(parents=True, exist_ok=True)
            (out / METRICS).unlink(missing_ok=True)
        self.watched = tensorboard is not None
        folder = tensorboard if here.leads else None
        self.telemetry = Telemetry(folder, self.detector, self.statistics, self.step)

    def fit(self, stop: int, progress: bool) -> None:
        module: nn.Module = self.detector.train()
        if self.here.size > 1:
            ids = [self.here.device.index] if self.here.device.type == "cuda" else None
            module = DistributedDataParallel(self.detector, device_ids=ids)
        bar = tqdm(
            total=self.options.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not (progress and self.here.leads),
        )
        first, started = self.step, time.perf_counter()
        with bar:
            for images, targets in self._batches(stop):
                self._step(module, images, targets)
                bar.update()
                if self.step % LOOK_EVERY == 0 or self.step == stop:
                    bar.set_postfix(self._flush())
                    now = time.perf_counter()
                    self.step_seconds.append((now - started) / (self.step - first))
                    first, started = self.step, now
                    self._watch()
                if self.step % LOOK_EVERY == 0 and self.step >= self.options.warmup:
                    self._look_at_densities()
                if self.step % self.options.checkpoint_every == 0 or self.step == stop:
                    self._checkpoint()

    def _batches(self, stop: int) -> Iterator[Batch]:
        options = self.options
        view = TrainingView(self.dataset, self.config, (options.hflip, options.vflip))
        sampler = StepSampler(
            len(self.dataset),
            options.batch_size,
            options.seed,
            self.step,
            stop,
            self.here.rank,
            self.here.size,
        )
        for images, targets in training_loader(view, sampler, options.workers):
            moved = [
                {k: v.to(self.here.device, non_blocking=True) for k, v in target.items()}
                for target in targets
            ]
            frame = images.to(
                self.here.device, non_blocking=True, memory_format=torch.channels_last
            )
            yield frame, moved

    def _step(self, module: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
        rate = self.options.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Detectors that sample what they learn from draw by seed, step and rank alone.
        torch.manual_seed((self.options.seed + self.step) * self.here.size + self.here.rank)
        dtype = AMP[self.options.amp]
        with torch.autocast(self.here.device.type, dtype=dtype, enabled=dtype is not None):
            losses = module(images, targets)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(self.scaler.scale(total))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.options.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        record = {name: value.detach() for name, value in losses.items()}
        self.pending.append({"step": self.step, **record, "grad_norm": norm, "lr": rate})
        self.step += 1

    def _see_labels(self, labels: Tensor) -> None:
        # Counted on the device; slot 0 is for the ignored ones.
        slots = (labels.clamp(min=-1) + 1).flatten()
        self.labels_seen.scatter_add_(0, slots, torch.ones_like(slots))

    def _flush(self) -> dict[str, str]:
        """Wait for the device, write the metrics down and refuse to go on from a NaN."""
        lines = [{k: float(v) for k, v in record.items()} for record in self.pending]
        self.pending.clear()
        if self.here.leads:
            with (self.out / METRICS).open("a") as stream:
                stream.writelines(json.dumps({**x, "step": int(x["step"])}) + "\n" for x in lines)
        self.telemetry.steps(lines)
        for line in lines:
            finite = all(torch.isfinite(torch.tensor(list(line.values()))))
            if not finite and self.options.amp != "fp16":  # the scaler skips such steps itself
                raise TrainingError(
                    f"step {int(line['step'])}: {line} is not finite. Lower --lr or --clip;"
                    f" the last sound checkpoint, if any, is {self.out / CHECKPOINT}"
                )
        last = lines[-1]
        return {"cls": f"{last['classification']:.3f}", "reg": f"{last['bbox_regression']:.3f}"}

    def _watch(self) -> None:
        """Show on TensorBoard, where it is wanted, what the last steps came to."""
        if self.watched:
            seen = torch.stack(self.here.gather(self.labels_seen.cpu())).sum(0)
            self.telemetry.look(
                self.step - 1,
                self.statistics,
                seen[1:],
                self.step_seconds[-1],
                problems=self.step >= self.options.warmup,
            )

    def _look_at_densities(self) -> None:
        """Warn, once, of densities that do not suit the batches."""
        if self.here.leads:
            for module in self.detector.modules():
                if isinstance(module, GradientDensity):
                    warn_of(module, self.warned)

    def _checkpoint(self) -> None:
        if self.pending:
            self._flush()
        counts = self.labels_seen.clone().cpu()
        self.labels_seen.zero_()
        for seen in self.here.gather(counts):
            self.statistics.add_labels(seen[1:])
        if self.here.leads:
            self.save()

    def save(self) -> None:
        Checkpoint(
            config=self.config,
            model={k: v.cpu() for k, v in self.detector.state_dict().items()},
            statistics=self.statistics,
            training={**self.options.to_dict(), "step": self.step, "versions": versions()},
            resume={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
            },
        ).save(self.out / CHECKPOINT)

    def _resume(self) -> None:
        saved = Checkpoint.load(self.out / CHECKPOINT)
        if saved.config != self.config:
            raise ValueError(f"{self.out / CHECKPOINT} holds another detector: {saved.config}")
        before = TrainOptions.of_run(saved.training).settled(self.config.architecture)
        changed = {
            key: (old, self.options.to_dict()[key])
            for key, old in before.to_dict().items()
            if old != self.options.to_dict()[key] and key not in ("workers", "checkpoint_every")
        }
        if changed:
            raise ValueError(f"cannot resume with other options (old, new): {changed}")
        self.detector.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.resume["optimizer"])
        self.scaler.load_state_dict(saved.resume["scaler"])
        self.statistics = saved.statistics
        self.step = int(saved.training["step"])
        if self.here.leads:
            _keep_steps(self.out / METRICS, self.step)

    def score_held_out(self) -> MeanAveragePrecision | None:
        """Run the finished detector over the held-out split and count what it scores."""
        if not self.here.leads:
            return None
        predict = torch_predictor(DeployedDetector(self.detector))
        results = list(detect(predict, self.config, self.held_out))
        observe(self.statistics, results)
        scored = mean_average_precision(self.config.class_names, results)
        self.telemetry.held_out(self.step, scored)
        return scored


def open_split(
    options: TrainOptions, split: str, class_names: tuple[str, ...] | None = None
) -> DetectionDataset:
    """A split of the run's data set, with the run's classes and its rule for damage."""
    return open_dataset(
        options.data,
        split,
        on_damage=options.on_damage,  # type: ignore[arg-type]
        class_names=class_names,
    )


def warn_of_shared_images(train: DetectionDataset, held_out: DetectionDataset) -> None:
    """Warn when images are both learnt from and held out: thresholds would flatter themselves."""
    shared = train.sources() & held_out.sources()
    if shared:
        warnings.warn(
            f"{len(shared)} of the {len(held_out)} images of split {held_out.split!r} are trained"
            f" on too (split {train.split!r}): thresholds derived from them will be too hopeful",
            stacklevel=4,
        )


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    return {
        "ghm_triton": ghm_triton.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which safe loading refuses
        "torchvision": torchvision.__version__,
    }


def _keep_steps(path: Path, steps: int) -> None:
    """Drop the metrics of steps that a resumed run will make again."""
    if path.exists():
        # What follows the last line break is empty, or what a run that was killed could still
        # write of a line: of a step after the checkpoint, before which whole lines are written.
        finished = path.read_text(errors="replace").split("\n")[:-1]
        kept = [x for n, x in enumerate(finished, 1) if _step_of(x, f"{path}, line {n}") < steps]
        path.write_text("".join(f"{line}\n" for line in kept))


def _step_of(line: str, where: str) -> int:
    """The step that a line of metrics is of."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is damaged: {line[:60]!r}. Repair or remove that line, or move the file"
            " away to resume without the metrics so far"
        ) from error
