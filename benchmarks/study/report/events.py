"""A study's loss curves as event files for TensorBoard, with the names that training uses."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.study.report.runs import Run, Study, number, setting_of

TAGS = {
    "classification": "loss/classification",
    "unguided_classification": "loss/unguided_classification",
    "bbox_regression": "loss/bbox_regression",
    "grad_norm": "optimiser/grad_norm",
}


def write_events(study: Study, folder: Path) -> int:
    """Write every run's curves into a folder of its own, by section, setting, method and seed.

    Args:
        study: Runs without curves are left out.
        folder: Made where missing. Curves of an earlier call give way.

    Returns:
        How many runs were written.

    Raises:
        ValueError: The package tensorboard is missing.
    """
    from ghm_triton.detection.training.telemetry import require_tensorboard

    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    written = 0
    for run in study.runs:
        points = _points(run)
        if not points:
            continue
        with SummaryWriter(str(folder / _place(run)), purge_step=0) as writer:
            for tag, value, step in points:
                writer.add_scalar(tag, value, step)
        written += 1
    return written


def _points(run: Run) -> list[tuple[str, float, int]]:
    curves = run.get("curves") or {}
    return [
        (tag, value, int(step))
        for name, tag in TAGS.items()
        for step, each in zip(curves.get("step") or (), curves.get(name) or (), strict=False)
        if (value := number(each)) is not None
    ]


def _place(run: Run) -> Path:
    setting = setting_of(run)
    place = f"{setting.data}, {setting.detector}, {setting.steps} steps, {setting.frame}"
    parts = (setting.section, place, run["method"], f"seed {run['seed']}")
    return Path(*(_plain(part) for part in parts))


def _plain(name: str) -> str:
    """A name that is one folder on any system."""
    return re.sub(r"[^A-Za-z0-9+=.-]+", "_", name).strip("._") or "_"
