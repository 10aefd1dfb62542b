"""The cores that this process may use, which in a container are fewer than the machine has."""

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Return the number of cores of this process: those it is bound to, at most its container's quota, at least 1.

    Args:
        cgroup: where the kernel shows the limits of the container.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(bound, int(_quota(cgroup) or bound)))


def _quota(cgroup: Path) -> float | None:
    """Return the quota in cores; None without one."""
    # The second version of cgroups, then the first.
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            # No quota is `max` or -1.
            return int(quota) / int(period) if quota.isdigit() else None
        except (OSError, ValueError):
            continue
    return None
