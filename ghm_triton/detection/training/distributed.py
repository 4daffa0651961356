"""One process or the processes that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among those of a run.

    Attributes:
        rank: 0 writes files and prints.
        size: Number of processes.
        device: Device of this process.
        group: The processes that share one gradient density; None when alone.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in order of rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that `torchrun` started, if any, and leave the group at the end.

    Args:
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, or another torch device.

    Raises:
        ValueError: The device is not available.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    computes_on = _device(device)
    if size == 1:
        yield World(0, 1, computes_on, None)
        return
    dist.init_process_group("nccl" if computes_on.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, computes_on, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _device(device: str) -> torch.device:
    available = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if available else "cpu"
    if device.startswith("cuda"):
        if not available:
            raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device")
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda; got {device!r}") from error
