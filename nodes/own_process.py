"""What a process knows of itself and asks of the system: its memory, its priority."""

from __future__ import annotations

import os
import time


def memory_bytes() -> int:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cpu_s() -> float:
    """Seconds of all its threads on a processor, since it started."""
    return time.process_time()


def lower_priority(nice: int) -> None:
    """This process at that nice level, or at the higher one that it was started with."""
    os.nice(max(0, nice - os.nice(0)))
