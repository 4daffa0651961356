"""How many processors this process may really use.

Inside a container the host's cores are visible but not ours: the quota of the control group
says how much time we get, and more threads than that only wait for one another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Where Linux shows the control groups and says which of them this process is in.
CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """The whole processors that this process may use, at least 1.

    The smaller of the processors that it may be scheduled on and the control group's quota
    (version 1 or 2), rounded down.

    Args:
        cgroups: The folder of the control groups.
        membership: The file that names the groups of this process.
    """
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        schedulable = len(os.sched_getaffinity(0))
    else:
        schedulable = os.cpu_count() or 1
    quota = min(_quotas(cgroups, membership), default=math.inf)
    return max(1, math.floor(min(schedulable, quota)))


def _quotas(cgroups: Path, membership: Path) -> Iterator[float]:
    """The quota in processors of every group that this process is in, or inside of."""
    for line in _text(membership).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            for folder in _upwards(cgroups, group):
                yield from _quota_v2(folder)
        elif "cpu" in controllers.split(","):
            for folder in _upwards(cgroups / "cpu", group):
                yield from _quota_v1(folder)


def _upwards(root: Path, group: str) -> Iterator[Path]:
    """The folder of a group and of each group around it.

    Inside a container the file may name the group as the host sees it; the root is then ours.
    """
    inner = Path(group.lstrip("/"))
    for part in (inner, *inner.parents):
        yield root / part


def _quota_v2(folder: Path) -> Iterator[float]:
    fields = _text(folder / "cpu.max").split()
    if len(fields) == 2 and fields[0] != "max":
        yield int(fields[0]) / int(fields[1])


def _quota_v1(folder: Path) -> Iterator[float]:
    quota = _text(folder / "cpu.cfs_quota_us").strip()
    period = _text(folder / "cpu.cfs_period_us").strip()
    if quota and period and int(quota) > 0:
        yield int(quota) / int(period)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
