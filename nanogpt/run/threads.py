"""The CPU threads of a process: its share of the cores that it may use."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WINDOW = 2.0  # seconds, at least, over which the load of other programs is measured
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


class Others:
    """The load of other programs on the cores that this process may use, as Linux counts it."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self.stat, self.mark = stat, self._read(stat)

    def busy_cores(self) -> float | None:
        """How many cores they kept busy since the last answer; None within WINDOW seconds, or if the system does not say.

        A container with a quota of time does not learn whose time its cores' is.
        """
        now = self._read(self.stat)
        if self.mark is None or now is None or now[0] - self.mark[0] < WINDOW:
            return None
        (seconds, every, own), self.mark = (a - b for a, b in zip(now, self.mark, strict=True)), now
        return max(0.0, (every - own) / seconds)

    @staticmethod
    def _read(stat: Path) -> tuple[float, float, float] | None:
        """(the time, seconds that the cores have worked, seconds that this process has worked)."""
        try:
            names = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            if len(names) > available_cores():
                return None
            lines = [line.split() for line in stat.read_text().splitlines()]
            # the columns are user, nice, system, idle, waiting for disks, and two kinds of interrupts
            ticks = sum(int(n) for name, *times in lines if name in names for n in (*times[:3], *times[5:7]))
            return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
        except (OSError, ValueError, AttributeError):
            return None


def threads_beside(busy: float, cores: int, threads: int) -> int | None:
    """A smaller number of threads that would be faster while other programs keep `busy` cores busy, or None.

    Each operation waits for its slowest thread. One that shares its core with another program takes twice as long, so
    threads on the free cores alone are faster, if at least half of the cores are free.
    """
    free = round(cores - busy)
    return free if cores / 2 <= free < min(cores, threads) else None
