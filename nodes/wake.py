"""For a process that sleeps most of the time and whose being woken late would be an error of what it measures or emulates.

Beside busy processes on few cores Linux wakes a process up to a slice (some milliseconds) late. All that is asked for
here is asked for once, may be refused, and is then done without.
"""

from __future__ import annotations

import contextlib
import os
import platform
import struct
import sys

NICE = -10
SLICE_NS = 100_000  # a process with a shorter slice than the running one comes first when it wakes (Linux 6.12)
_PR_SET_TIMERSLACK = 29
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # numbers of the system call, which the C library does not offer


def wake_in_time() -> None:
    """Put this process first when it wakes: higher priority (root only), exact timers, a short slice."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
    if sys.platform != "linux":
        return
    import ctypes

    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; the kernel else adds up to 50 us to every sleep
    number = _SCHED_SETATTR.get(platform.machine())
    if number is not None:
        # struct sched_attr: size, policy (0: normal), flags, nice, priority, runtime (the slice), deadline, period
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        libc.syscall(number, 0, struct.pack("IIQiIQQQ", 48, 0, 0, nice, 0, SLICE_NS, 0, 0), 0)
