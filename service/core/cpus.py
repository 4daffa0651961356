"""The number of processors that this process may use.

A container sees the host's processors, but the quota of its control group bounds the time on them;
threads beyond the quota only wait for one another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_cpus(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the number of processors that this process may use, at least 1.

    This is the smaller of the processors that it may be scheduled on and the quota of its control
    group (version 1 or 2), rounded down.

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
    """Yield the quota, in processors, of each group of this process and of each group around it."""
    for line in _read(membership).splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            root, read_quota = cgroups, _quota_v2
        elif "cpu" in controllers.split(","):
            root, read_quota = cgroups / "cpu", _quota_v1
        else:
            continue
        # Inside a container the file may name the group as the host sees it: the root is ours.
        inner = Path(group.lstrip("/"))
        for part in (inner, *inner.parents):
            quota, period = read_quota(root / part)
            if quota.isdecimal() and period.isdecimal() and int(quota) > 0:
                yield int(quota) / int(period)


def _quota_v2(folder: Path) -> tuple[str, str]:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return quota, period


def _quota_v1(folder: Path) -> tuple[str, str]:
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    quota, period = (_read(folder / name).strip() for name in names)
    return quota, period


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
