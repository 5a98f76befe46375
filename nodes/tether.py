"""Run a command that dies with the process that started it, even when that one is killed with SIGKILL.

A process that is killed with SIGKILL runs no clean-up, so its children must be told by the kernel. On Linux
`prctl(PR_SET_PDEATHSIG)` does: the wrapper asks for SIGKILL at its parent's death and then becomes the command (the
wish outlives `exec`, and costs no process of its own). Three things to know:

- the "parent" is the *thread* that started the process, so start from one that lives as long as the child may;
- the wish is not inherited: what the command itself starts must be tethered by the command;
- it is forgotten if the command is a set-user-id program.

Elsewhere than on Linux the command is run as it is, and may outlive a parent that was killed with SIGKILL.

This file is also the wrapper: it is run by path, with nothing of this project and no site packages imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1


def tethered(argv: Sequence[str]) -> list[str]:
    """`argv`, to be started by this process, such that it dies with it."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]


def die_with(parent: int) -> None:
    """From now on this process is killed when its parent, which has this process id, dies."""
    if sys.platform == "linux":
        import ctypes

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            sys.exit(f"error: prctl: {os.strerror(ctypes.get_errno())}")
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGKILL)


def _become(parent: int, argv: list[str]) -> None:
    die_with(parent)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"error: {argv[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
