"""How many threads compute and how they wait, chosen by the machine's cores and load before torch is imported.

A thread of OpenMP that waits for others spins on its core by default. On a quiet machine that saves some microseconds a
step; beside other busy processes the spinning threads take the cores from those that they wait for.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

_WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
_ASKED = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # by the user, before anything is chosen


def cores(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those of its affinity, within the quota of its control group."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / file).read_text() for file in files).split()
            if quota not in ("max", "-1"):
                count = min(count, max(1, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):
            continue
    return count


def threads_by_load(count: int, load: float, workers: int = 1) -> int:
    """Threads of each worker: the cores that are free, at least half of all and two, shared by the workers."""
    free = min(count, max(2, count // 2, round(count - load)))
    return max(1, free // workers)


def choose_threads(workers: int = 1, environment: MutableMapping[str, str] = os.environ, asked: str = _ASKED) -> int:
    """Set the number of threads and passive waiting in the environment, where the user has not; before torch is imported.

    Args:
        workers: processes that compute side by side.
        environment: where to set it; child processes inherit it.
        asked: threads that the user wants, OMP_NUM_THREADS by default; "" lets the load decide.

    Returns:
        Threads of each worker.
    """
    for name, value in _WAITING.items():
        environment.setdefault(name, value)
    if asked.isdecimal() and int(asked):
        return int(asked)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    threads = threads_by_load(cores(), load, workers)
    if workers == 1:
        environment["OMP_NUM_THREADS"] = str(threads)
    return threads


__all__ = ["choose_threads", "cores", "threads_by_load"]
