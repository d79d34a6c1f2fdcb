"""The CPU threads of a process: its share of the cores that it may use."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")  # where Linux has the control groups of a container, version 2 or 1


def available_cores(cgroups: Path = CGROUPS) -> int:
    """Number of cores that this process may use: those of its CPU affinity, or the quota of its container if less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        if (cgroups / "cpu.max").exists():
            quota, period = (cgroups / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota) > 0:
            cores = min(cores, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # there is no quota (max, or -1), or there are no control groups
        pass
    return max(1, cores)


def choose_threads(threads: int | str, say: Callable[[str], Any], cgroups: Path = CGROUPS) -> None:
    """Set the number of PyTorch's threads. With `auto`, each process on this machine gets its share of the cores.

    If OMP_NUM_THREADS is set, `auto` leaves it at that, except for 1 under torchrun, which sets that by default.
    """
    import torch

    number = os.environ.get("LOCAL_WORLD_SIZE", "") if "LOCAL_RANK" in os.environ else ""
    processes = max(1, int(number)) if number.isdigit() else 1
    if threads == "auto":
        given = os.environ.get("OMP_NUM_THREADS")
        if given and not (given == "1" and processes > 1):
            return
        cores = available_cores(cgroups)
        share = max(1, cores // processes)
        threads = share if processes > 1 else min(share, torch.get_num_threads())
        if threads != torch.get_num_threads():
            why = f"{cores} cores are available" + (f" to {processes} processes" if processes > 1 else "")
            say(f"threads: {threads}, because {why} (--threads)")
    if threads != torch.get_num_threads():
        torch.set_num_threads(int(threads))
