"""A study's loss curves as TensorBoard event files, under the tags that training uses."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.study.report.runs import Study

TAGS = {
    "classification": "loss/classification",
    "unguided_classification": "loss/unguided_classification",
    "bbox_regression": "loss/bbox_regression",
    "grad_norm": "optimiser/grad_norm",
}


def write_events(study: Study, folder: Path) -> int:
    """Write the curves of every run into a folder of its own, by section, setting, method and seed.

    Args:
        study: Runs without curves are skipped.
        folder: Created if missing. Curves of an earlier call are replaced.

    Returns:
        The number of runs written.

    Raises:
        ValueError: The package tensorboard is missing.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard: pip install it") from None
    written = 0
    for run in study.runs.itertuples():
        place = f"{run.data}, {run.detector}, {run.steps} steps, {run.frame}"
        names = (run.section, place, run.method, f"seed {run.seed}")
        points = [
            (tag, value, int(step))
            for name, tag in TAGS.items()
            for step, value in zip(
                run.curves.get("step", ()), run.curves.get(name, ()), strict=False
            )
            if value is not None
        ]
        if not points:
            continue
        target = folder.joinpath(*map(_folder_name, names))
        with SummaryWriter(str(target), purge_step=0) as writer:
            for tag, value, step in points:
                writer.add_scalar(tag, value, step)
        written += 1
    return written


def _folder_name(name: str) -> str:
    """A name that is valid for one folder on any system."""
    return re.sub(r"[^A-Za-z0-9+=.-]+", "_", name).strip("._") or "_"
