"""What a process knows of itself and asks of the system: its memory, its priority."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
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


def without_bars() -> None:
    """Libraries' own progress bars, which are on by default."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def has_accelerator() -> bool:
    """Whether a driver's device is there; asked before torch is imported."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))


def keep_memory() -> None:
    """What this process frees it keeps for the next tensor, in big pages: glibc would give each large buffer back to the
    system, and have it cleared page by page, at every operation: on two Zen 3 cores a quarter of a step of fifty on mini-sd3.

    Before torch is imported, and for batches on a CPU: the process stays as big as it ever was. Elsewhere it does nothing.
    """
    if has_accelerator():
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: transparent huge pages for tensors of 2 MiB or more
    with contextlib.suppress(OSError, AttributeError):  # a C library without mallopt
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            mallopt(parameter, value)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def ready_for_libraries() -> None:
    """Before the first thread is started: torch and diffusers are imported in threads, and some of it writes into the
    environment, which another thread may be reading. Of that the process dies (setenv and getenv of the C library). So
    what is written is written now, and what writes it on import is imported now.

    On a machine without an accelerator they do without triton, which only writes kernels for one and takes 70 MB.
    """
    without_bars()
    if not has_accelerator():
        sys.modules.setdefault("triton", None)  # type: ignore[arg-type]  # an import of it is an ImportError then
    importlib.import_module("torch._dynamo.package")


def leave() -> None:
    """End this process at once; everything it had is closed and written. Torch and diffusers would be taken down piece by
    piece, for seconds, where the system takes all of it back in one."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it is gone
            stream.flush()
    os._exit(0)
