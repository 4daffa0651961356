"""The training loop; everything beside the steps is a hook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ghm_triton.detection.data.loader import Batch, StepSampler, TrainingView, training_loader
from ghm_triton.detection.evaluate import MeanAveragePrecision
from ghm_triton.detection.models.config import DetectorConfig
from ghm_triton.detection.training.build import AMP, Run, Splits, build_run
from ghm_triton.detection.training.checkpoint import CHECKPOINT, resume_run
from ghm_triton.detection.training.config import TrainOptions
from ghm_triton.detection.training.distributed import world
from ghm_triton.detection.training.hooks import Hook, default_hooks, require_tensorboard


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        checkpoint: Path of the checkpoint.
        held_out: Average precision on the held-out split, on the first process of a finished run.
        step_seconds: Mean durations of a step in seconds, of every `REPORT_EVERY` steps of this
            call, batches and checkpoints included.
    """

    checkpoint: Path
    held_out: MeanAveragePrecision | None
    step_seconds: tuple[float, ...] = ()


def train(
    options: TrainOptions,
    config: DetectorConfig,
    out: Path,
    *,
    splits: Splits | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: bool = True,
    stop_after: int | None = None,
    tensorboard: Path | None = None,
) -> TrainResult:
    """Train a detector and count the statistics that its thresholds are derived from.

    Args:
        options: Options of the run.
        config: Description of the detector.
        out: Folder of `checkpoint.pt` and `metrics.jsonl` (one JSON line per step).
        splits: The data, if it has been opened; None opens it as the options name it.
        resume: Continue from the checkpoint in `out`; the losses are those of an unbroken run.
        device: `auto`, `cpu` or `cuda`.
        progress: Whether to draw a progress bar.
        stop_after: Stop, as if interrupted, once this many steps are done.
        tensorboard: Folder of TensorBoard's event files; None writes none.

    Returns:
        The path of the checkpoint, and the average precision on the held-out split.

    Raises:
        ValueError: The data set or an option does not fit, the checkpoint to resume from is
            damaged, or TensorBoard is not installed.
        TrainingError: The loss or the gradient is no longer finite.
    """
    if tensorboard is not None:
        require_tensorboard()
    with world(device) as here:
        run = build_run(
            options, config, out, here, splits=splits, resume=resume, stop_after=stop_after
        )
        if resume:
            resume_run(run)
        hooks = default_hooks(run, resume=resume, progress=progress, tensorboard=tensorboard)
        try:
            fit(run, hooks)
        finally:
            for hook in hooks:
                hook.close()
    return TrainResult(out / CHECKPOINT, run.held_out, tuple(run.step_seconds))


def fit(run: Run, hooks: Sequence[Hook]) -> None:
    """Make the steps that are left, calling the hooks after each and at the end."""
    module: nn.Module = run.detector.train()
    if run.world.size > 1:
        ids = [run.world.device.index] if run.world.device.type == "cuda" else None
        module = DistributedDataParallel(run.detector, device_ids=ids)
    for images, targets in batches(run):
        run.record = train_step(run, module, images, targets)
        run.step += 1
        for hook in hooks:
            hook.after_step(run)
    for hook in hooks:
        hook.after_training(run)


def batches(run: Run) -> Iterator[Batch]:
    """The batches of the steps that are left, on the device."""
    options, device = run.options, run.world.device
    view = TrainingView(run.splits.train, run.config, (options.hflip, options.vflip))
    sampler = StepSampler(
        len(run.splits.train),
        options.batch_size,
        options.seed,
        run.step,
        run.stop,
        run.world.rank,
        run.world.size,
    )
    for images, targets in training_loader(view, sampler, options.workers):
        frame = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        yield frame, [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in targets]


def train_step(
    run: Run, module: nn.Module, images: Tensor, targets: list[dict[str, Tensor]]
) -> dict[str, Any]:
    """One step of the optimiser; returns the losses, the gradient's norm and the learning rate."""
    options, optimizer, scaler = run.options, run.optimizer, run.scaler
    rate = options.learning_rate(run.step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    # Detectors that sample their training examples draw by seed, step and rank alone.
    torch.manual_seed((options.seed + run.step) * run.world.size + run.world.rank)
    dtype = AMP[options.amp]
    with torch.autocast(run.world.device.type, dtype=dtype, enabled=dtype is not None):
        losses = module(images, targets)
    total = torch.stack(list(losses.values())).sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(scaler.scale(total))
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.detector.parameters(), options.clip)
    scaler.step(optimizer)
    scaler.update()
    return {**{k: v.detach() for k, v in losses.items()}, "grad_norm": norm, "lr": rate}
