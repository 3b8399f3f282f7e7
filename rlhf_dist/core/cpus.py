"""How many CPUs this process may use."""

from __future__ import annotations

import os
from pathlib import Path


def usable_cpus(membership: Path = Path("/proc/self/cgroup"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use at once: of those it is bound to, as many as a quota leaves (of a container, a job or a
    service: control groups, version 1 and 2). At least 1.

    Args:
        membership: the groups of this process.
        cgroups: where the groups are mounted.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        # Every group above has a say. In a container the path may be the host's, of which only the mount itself is seen.
        for folder in (group, *group.parents):
            quota = _quota(cgroups / controllers / folder)
            if quota is not None:
                usable = min(usable, max(1, int(quota)))
    return usable


def _quota(group: Path) -> float | None:
    """CPUs that a control group may use; None for no bound, or where that cannot be read."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # there is none, or it is "max"
        return None
