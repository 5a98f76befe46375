"""What a process knows of itself and asks of the system: its memory, its priority."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path


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


def has_accelerator() -> bool:
    """Whether a driver's device is there; asked before torch is imported."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def spare_memory() -> None:
    """Before torch is imported, on a machine without an accelerator: diffusers pulls in triton, which only writes kernels
    for one, and with it 70 MB of resident memory. Torch and diffusers both do without where it is not installed."""
    if not has_accelerator():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # an import of it is an ImportError then


def leave() -> None:
    """End this process at once; everything it had is closed and written. Torch and diffusers would be taken down piece by
    piece, for seconds, where the system takes all of it back in one."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(0)
